"""The launcher, with real processes: environment, signals, exit codes, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_rlhf.cli import environment, launch

DEFAULTS = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "GLOO_SOCKET_IFNAME",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
)
MARK = "NEMO_RLHF_LAUNCHED"
DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")

PREFIX = """
import os, signal, sys, time
from pathlib import Path
from nemo_rlhf.cli.launch import launch_if_needed
OUT = Path(sys.argv[1])
launch_if_needed(3, tensor_parallel=int(os.environ.get("TP", "1")))
RANK = int(os.environ["RANK"])
def say(text):
    temporary = OUT / f".{RANK}"
    temporary.write_text(str(text))
    temporary.rename(OUT / str(RANK))
"""


def clean_env(**more: str) -> dict[str, str]:
    env = {
        k: v for k, v in os.environ.items() if k not in (*DISTRIBUTED, *DEFAULTS, MARK) and not k.startswith("SLURM_")
    }
    return {**env, "PYTHONPATH": str(Path(launch.__file__).parents[2]), **more}


def start(tmp_path: Path, body: str, **env: str) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(PREFIX + body)
    (tmp_path / "out").mkdir()
    return subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "out")],
        env=clean_env(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(tmp_path: Path) -> dict[int, str]:
    files = (tmp_path / "out").glob("[0-9]*")
    return {int(path.name): path.read_text() for path in files}


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_every_rank_gets_its_environment(tmp_path: Path) -> None:
    names = ",".join(DISTRIBUTED)
    program = start(tmp_path, f"say([os.environ[name] for name in '{names}'.split(',')])\nprint(sys.argv[0])")
    out, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (0, "")
    ranks = {rank: eval(text) for rank, text in said(tmp_path).items()}
    assert sorted(ranks) == [0, 1, 2]
    for rank, values in ranks.items():
        assert values[:5] == [str(rank), str(rank), "3", "3", "127.0.0.1"]
        assert int(values[5]) > 0 and values[5] == ranks[0][5]
        assert int(values[6]) == max(1, len(os.sched_getaffinity(0)) // 3)
    assert out.count("program.py") == 3


def test_chosen_thread_count_is_kept(tmp_path: Path) -> None:
    program = start(tmp_path, "say(os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="7")
    program.communicate(timeout=60)
    assert set(said(tmp_path).values()) == {"7"}


@pytest.mark.parametrize("started", [{}, {"RANK": "0", "WORLD_SIZE": "3", "MASTER_PORT": "1"}])
def test_ranks_get_defaults_where_nothing_is_set(tmp_path: Path, started: dict[str, str]) -> None:
    """However they were started: by this program, or by torchrun."""
    body = f"say([os.environ.get(name) for name in {DEFAULTS}])"
    start(tmp_path, body, TMPDIR=str(tmp_path), **started).communicate(timeout=60)
    ranks = {rank: eval(text) for rank, text in said(tmp_path).items()}
    caches = f"{tmp_path}/nemo-rlhf-{os.getuid()}"
    allocator = ["expandable_segments:True"] * 2
    expected = [*allocator, None, None, f"{caches}/triton", f"{caches}/inductor"]
    assert ranks == dict.fromkeys(range(1 if started else 3), expected)


def test_ranks_keep_what_is_set(tmp_path: Path) -> None:
    body = f"say([os.environ.get(name) for name in {DEFAULTS}])"
    chosen = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "TRITON_CACHE_DIR": "/t", "NCCL_SOCKET_IFNAME": "=lo"}
    job = {"SLURM_JOB_ID": "77", "TMPDIR": str(tmp_path), "TP": "2"}
    start(tmp_path, body, **chosen, **job).communicate(timeout=60)
    caches = f"{tmp_path}/nemo-rlhf-{os.getuid()}-77"
    expected = ["max_split_size_mb:64", None, "lo", "1", "/t", f"{caches}/inductor"]
    assert {rank: eval(text) for rank, text in said(tmp_path).items()} == dict.fromkeys(range(3), expected)


@pytest.mark.parametrize("value", ["^lo", "lo,eth7", "l", "nothing0"])
def test_gloo_is_given_no_interface_that_does_not_exist(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes lists, prefixes and exclusions, too."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {"NCCL_SOCKET_IFNAME": value})
        environment.set_defaults()
        assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize(("torch", "needed"), [("2.6.0+cu124", True), ("2.8.0", False), ("2.13.0", False)])
def test_what_torch_does_by_itself_is_left_to_it(torch: str, needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {})
        patch.setattr(environment, "version", lambda name: torch)
        environment.set_defaults()
        assert ("TORCH_NCCL_TRACE_BUFFER_SIZE" in os.environ) == needed
        assert ("TORCH_NCCL_AVOID_RECORD_STREAMS" in os.environ) == needed


def test_failing_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    program = start(tmp_path, "say(os.getpid())\nif RANK == 1: sys.exit(9)\ntime.sleep(300)")
    _, err = program.communicate(timeout=60)
    assert program.returncode == 9
    why = "none of nemo-rlhf's own: code that runs in its process has likely called sys.exit or os._exit"
    assert err == f"nemo-rlhf: rank 1 ended with exit code 9 ({why}); the other 2 were stopped.\n"
    assert not any(alive(int(pid)) for pid in said(tmp_path).values())


def test_killed_rank_is_named_with_its_signal(tmp_path: Path) -> None:
    program = start(tmp_path, "say(os.getpid())\ntime.sleep(300)")
    wait_for(lambda: len(said(tmp_path)) == 3)
    os.kill(int(said(tmp_path)[2]), signal.SIGKILL)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 128 + signal.SIGKILL
    assert "rank 2 was killed by SIGKILL (out of memory" in err


def test_rank_that_ignores_sigterm_is_killed_with_what_it_started(tmp_path: Path) -> None:
    body = (
        "import subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "helper = subprocess.Popen(['sleep', '300'])\nsay(f'{os.getpid()} {helper.pid}')\n"
        "while RANK == 0 and len(list(OUT.glob('[0-9]*'))) < 3: time.sleep(0.02)\n"
        "if RANK == 0: helper.kill(); sys.exit(3)\ntime.sleep(300)"
    )
    program = start(tmp_path, body)
    begin = time.monotonic()
    program.communicate(timeout=60)
    assert program.returncode == 3
    assert time.monotonic() - begin < launch.GRACE_S + 20
    pids = [int(pid) for rank, text in said(tmp_path).items() if rank for pid in text.split()]
    assert len(pids) == 4
    wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_every_rank_and_75_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    body = (
        "def stop(number, frame):\n    say(f'stopped by {number}')\n    sys.exit(75)\n"
        f"signal.signal({int(number)}, stop)\nsay('ready')\ntime.sleep(300)"
    )
    program = start(tmp_path, body)
    wait_for(lambda: list(said(tmp_path).values()) == ["ready"] * 3)
    program.send_signal(number)
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (75, "")
    assert list(said(tmp_path).values()) == [f"stopped by {int(number)}"] * 3


def test_ranks_that_end_together_with_69_have_said_why(tmp_path: Path) -> None:
    program = start(tmp_path, "time.sleep(0.3 * RANK)\nsys.exit(69)")
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (69, "")


def test_ctrl_c_reaches_every_rank_and_a_second_one_kills(tmp_path: Path) -> None:
    body = "signal.signal(signal.SIGINT, lambda *_: say('interrupted'))\nsay('ready')\nwhile True: time.sleep(1)"
    program = start(tmp_path, body)
    wait_for(lambda: list(said(tmp_path).values()) == ["ready"] * 3)
    program.send_signal(signal.SIGINT)
    wait_for(lambda: list(said(tmp_path).values()) == ["interrupted"] * 3)
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=30)
    assert program.returncode == 130


def test_wrong_input_of_rank_0_is_left_to_its_own_sentence(tmp_path: Path) -> None:
    program = start(tmp_path, "if RANK == 0: sys.exit(2)\ntime.sleep(300)")
    _, err = program.communicate(timeout=60)
    assert (program.returncode, err) == (2, "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the guard is Linux's")
def test_no_rank_outlives_a_killed_launcher(tmp_path: Path) -> None:
    program = start(tmp_path, "say(os.getpid())\ntime.sleep(300)")
    wait_for(lambda: len(said(tmp_path)) == 3)
    pids = [int(pid) for pid in said(tmp_path).values()]
    assert all(alive(pid) for pid in pids)
    program.kill()
    program.communicate(timeout=30)
    wait_for(lambda: not any(alive(pid) for pid in pids), seconds=5)


def test_interactive_session_is_told_what_to_do() -> None:
    code = "from nemo_rlhf.cli.launch import launch_if_needed\nlaunch_if_needed(2)\n"
    done = subprocess.run(
        [sys.executable, "-"], input=code, capture_output=True, text=True, env=clean_env(), timeout=60, check=False
    )
    assert done.returncode == 1
    assert "put the code in a file" in done.stderr


@pytest.fixture
def no_job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment outside of any job, put back afterwards together with what the launcher sets."""
    for name in [*DISTRIBUTED, MARK, *(key for key in os.environ if key.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_rank_without_its_rank_starts_no_others(no_job: pytest.MonkeyPatch) -> None:
    no_job.setenv(MARK, "1")
    with pytest.raises(ValueError, match="NEMO_RLHF_LAUNCHED is set, but RANK is not"):
        launch.launch_if_needed(2)


def test_single_process_needs_nobody(no_job: pytest.MonkeyPatch) -> None:
    launch.launch_if_needed(1)
    assert [os.environ[key] for key in DISTRIBUTED[:5]] == ["0", "0", "1", "1", "127.0.0.1"]
    assert int(os.environ["MASTER_PORT"]) > 0
    launch.launch_if_needed(1)  # a second call finds all in place


def test_ranks_of_torchrun_are_left_alone(no_job: pytest.MonkeyPatch) -> None:
    given = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    for key, value in given.items():
        no_job.setenv(key, value)
    launch.launch_if_needed(4, num_nodes=2)
    assert {key: os.environ[key] for key in given} == given
    with pytest.raises(ValueError, match=r"started with 8 processes, but trainer.devices=4 .* is 4"):
        launch.launch_if_needed(4)


def test_several_nodes_need_a_launcher(no_job: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="srun --nodes=2 --ntasks-per-node=8"):
        launch.launch_if_needed(8, num_nodes=2)


def slurm_task(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    task = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
            "SLURM_NTASKS": "16", "SLURM_STEP_NODELIST": "gpu[07-08,11]"}  # fmt: skip
    for key, value in {**task, **more}.items():
        monkeypatch.setenv(key, value)


def test_srun_tasks_find_their_rank(no_job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slurm_task(no_job)
    no_job.setenv("PATH", str(tmp_path))  # no scontrol there
    launch.launch_if_needed(8, num_nodes=2)
    assert [os.environ[key] for key in DISTRIBUTED[:5]] == ["9", "1", "16", "8", "gpu07"]
    assert 10000 <= int(os.environ["MASTER_PORT"]) < 30000


def test_scontrol_is_asked_for_hosts(no_job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho asked-for-$3\necho other\n")
    (tmp_path / "scontrol").chmod(0o755)
    no_job.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    slurm_task(no_job, SLURM_STEP_NODELIST="nodes")
    launch.env_from_slurm()
    assert os.environ["MASTER_ADDR"] == "asked-for-nodes"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-4]", "n1"),
        ("n[003,7-9],m2", "n003"),
        ("a-b[2-3]-x", "a-b2-x"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host_without_scontrol(no_job: pytest.MonkeyPatch, tmp_path: Path, nodelist: str, host: str) -> None:
    no_job.setenv("PATH", str(tmp_path))
    assert launch._first_host(nodelist) == host


def test_batch_script_is_not_a_task_of_srun(no_job: pytest.MonkeyPatch) -> None:
    slurm_task(no_job)
    no_job.delenv("SLURM_STEP_ID")
    with pytest.raises(ValueError, match="srun --nodes=2"):
        launch.launch_if_needed(8, num_nodes=2)
