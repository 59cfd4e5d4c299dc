"""Job scripts: what they say, that shells and SLURM accept them, and jobs that really run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_rlhf.cli import main
from nemo_rlhf.config import load
from nemo_rlhf.launch.slurm import Job, render
from tests.jobs import FROM_OUTSIDE, ROOT, with_program
from tests.slurm import Cluster, Jobs, cluster, program_of, why_not

pytestmark = pytest.mark.usefixtures("outside_of_any_job")

PPO = [
    "ppo",
    "model.restore_from=/shared/sft",
    "data.prompts=prompts.jsonl",
    "reward.function=my.rewards:score",
    "exp_manager.explicit_log_dir=/shared/run",
]
SEVENTY = [*PPO, "--config", "examples/llama3_70b_ppo"]
NO_ACCOUNT = "slurm.account=null"
needs_slurm = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module", autouse=True)
def outside() -> Iterator[None]:
    """Jobs inherit the environment of who submits them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in FROM_OUTSIDE:
            patch.delenv(name, raising=False)
        yield


def script(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["slurm", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["slurm", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nemo-rlhf: error: ") and err.count("\n") == 1
    return err


def directives(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len(found) == len(dict(found))
    return dict(found)


VARIANTS = {
    "plain": PPO,
    "pyxis": [*SEVENTY, "--cluster", "cluster/pyxis"],
    "apptainer": [*SEVENTY, "--cluster", "cluster/apptainer", "slurm.container.mounts=['/a:/b','/c:/c']"],
    "venv": [*PPO, "--cluster", "cluster/venv", "slurm.max_requeues=0", "slurm.gpu_type=h100"],
    "quotes": [*PPO, "data.prompts='it is; $(here) \\'a\\'.jsonl'", "slurm.environment={NAME:'a $b \"c\"'}"],
    "convert": ["convert", "import", "/hf/a b", "/shared/a b", "slurm.gpus=false", "slurm.cpus_per_task=4"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_shells_accept_the_scripts(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    assert script(capsys, *VARIANTS[name], "--out", str(path)) == f"{path}\n"
    assert path.read_text() == script(capsys, *VARIANTS[name])
    passes_shellcheck(path, "--severity=warning")  # how a user's own words are quoted is no matter of style


def passes_shellcheck(path: Path, *options: str) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert shellcheck, "the extra dev brings shellcheck"
    checked = subprocess.run([shellcheck, *options, path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_nodes_and_gpus_have_one_source(capsys: pytest.CaptureFixture[str]) -> None:
    text = script(capsys, *SEVENTY, "trainer.num_nodes=16", "--cluster", "cluster/pyxis", "--after", "77")
    said = directives(text)
    assert said["nodes"] == "16" and said["ntasks-per-node"] == said["gpus-per-node"] == "8"
    assert said["signal"] == "USR1@300" and "requeue" in said and said["dependency"] == "afterok:77"
    assert "--nodes=16 --ntasks=128 --ntasks-per-node=8" in text and "trainer.num_nodes=16" in text
    assert "--container-image=/shared/images/nemo_rlhf.sqsh" in text
    for key in ("slurm.nodes=2", "slurm.num_nodes=2", "slurm.gpus_per_node=8", "+slurm.ntasks=8"):
        assert "trainer.num_nodes and trainer.devices" in refused(capsys, *PPO, key)
    for option in ("--nodes=2", "-N2", "--gpus-per-node=4", "--gres=gpu:2", "--cpus-per-gpu=8"):
        assert "trainer.num_nodes and trainer.devices" in refused(capsys, *PPO, f"slurm.options=['{option}']")
    for option in ("--mem-bind=local", "--time-min=60", "--gres-flags=enforce-binding", "--dependency=singleton"):
        name, _, value = option.removeprefix("--").partition("=")
        assert directives(script(capsys, *PPO, f"slurm.options=['{option}']"))[name] == value


def test_a_job_of_cpus_asks_for_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    said = directives(script(capsys, *PPO, "slurm.gpus=false", "slurm.exclusive=false", "slurm.memory=null"))
    assert not {"gpus-per-node", "exclusive", "mem", "account", "dependency"} & set(said)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["slurm.tine=1"], "slurm.time"),
        (["slurm.time=soon"], "04:00:00"),
        (["slurm.time=5"], "slurm.signal_s=300 leaves nothing of slurm.time=5, which is 300 s"),
        (["slurm.time=1-1", "slurm.signal_s=90000"], "which is 90000 s"),
        (["slurm.signal_s=0"], "1 or more"),
        (["slurm.cpus_per_task=0"], "1 or more"),
        (["slurm.account='a b'"], "slurm.account='a b'"),
        (["slurm.job_name=a/b"], "leave out the /"),
        (["slurm.job_name='a%jb'"], "slurm.job_name='a%jb'"),
        (["slurm.log_dir=logs/%u"], "slurm.log_dir='logs/%u'"),
        (["slurm.container.runtime=docker"], "pyxis, apptainer"),
        (["slurm.container.image=/a.sif"], "set both or neither"),
        (["slurm.container.mounts=['/a:/b']"], "slurm.container.runtime"),
        (["slurm.container={runtime: pyxis, image: /a.sqsh, mounts: ['/c d:/c']}"], "'/c d:/c'"),
        (["slurm.environment={'A B':c}"], "slurm.environment"),
        (["slurm.options=[constraint]"], "--constraint=ib"),
        (["ppo.lamb=1"], "ppo.lam"),
        (["--cluster", "nowhere"], "no configuration file nowhere"),
        (["--after", "x"], "--after=x"),
        (["--after", "7", "slurm.options=['--dependency=singleton']"], "exclude each other"),
        (["--out", "/nowhere/job.sh"], "create it first"),
        (["--submit", "--test-only"], "not allowed with"),
    ],
)
def test_mistakes_are_told(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(capsys, *PPO, *words)


def test_mistakes_in_a_conversion_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert "convert import HF_DIR CKPT_DIR" in refused(capsys, "convert", "import", "/a")
    assert "--config=x" in refused(capsys, "convert", "import", "/a", "/b", "--config", "x")


def test_without_slurm_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for option in ("--submit", "--test-only"):
        assert "no sbatch on this machine" in refused(capsys, *PPO, option)


def test_sbatch_may_say_more_than_the_number(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said, sbatch = ["echo 'Welcome.'", "echo 'sbatch: 3 GPU hours are left' >&2", "echo '12;site'"], tmp_path / "sbatch"
    for lines, code in ((said, 0), (said[:2], 2)):
        sbatch.write_text("\n".join(["#!/bin/sh", "cat >/dev/null", *lines, ""]))
        sbatch.chmod(0o755)
        assert main(["slurm", *PPO, f"slurm.log_dir={tmp_path}", "--submit"]) == code
        out, err = capsys.readouterr()
        assert "3 GPU hours are left" in err and out == ("12\n" if code == 0 else "")
    assert "sbatch gave no job number but 'Welcome." in err


def test_shipped_scripts_are_what_the_command_writes(tmp_path: Path) -> None:
    shipped = ROOT / "scripts" / "slurm"
    subprocess.run([shipped / "render.sh", "cluster/pyxis", tmp_path], env=with_program(), check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(written) == 4
    assert written == {name: (shipped / name).read_text() for name in written}, "run scripts/slurm/render.sh again"
    for path in shipped.glob("*.sh"):
        passes_shellcheck(path)


# srun that notes what it was asked for, and under which variables
SRUN = """#!/bin/bash
{ printf '%s\\n' "$@" "OMP_NUM_THREADS=$OMP_NUM_THREADS"; echo; } >>"$CALLS"
"""


def steps(tmp_path: Path, *words: str, log_dir: str = ".", cpus: str = "8(x2)", **env: str) -> list[list[str]]:
    """Arguments of both steps that the script of a job of two nodes with two ranks each starts, from ``here``."""
    programs, here, calls = tmp_path / "bin", tmp_path / "here", tmp_path / "calls"
    for directory in (programs, here):
        directory.mkdir(exist_ok=True)
    for left in (*tmp_path.rglob("progress"), *tmp_path.glob("calls")):
        left.unlink()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\nprintf 'n1\\nn2\\n'\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    run = ["sft", "model.restore_from=.", "data.train=x", "exp_manager.explicit_log_dir=run"]
    layout = ["trainer.num_nodes=2", "trainer.devices=2", f"slurm.log_dir={log_dir}", *words]
    assert main(["slurm", *run, *layout, "--out", str(tmp_path / "job.sh")]) == 0
    given = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": cpus, "CALLS": str(calls)}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(["bash", tmp_path / "job.sh"], cwd=here, env={**given, **job, **path, **env}, check=True)
    return [call.splitlines() for call in calls.read_text().split("\n\n")[:-1]]


def test_a_rank_gets_its_share_of_the_cores(tmp_path: Path) -> None:
    for cpus, share in (("8(x2)", 4), ("128,6", 3), ("9(x2)", 4)):
        _, run = steps(tmp_path, cpus=cpus)
        assert f"--cpus-per-task={share}" in run and run[-1] == f"OMP_NUM_THREADS={share}"
    _, run = steps(tmp_path, OMP_NUM_THREADS="3")
    assert "--cpus-per-task=4" in run and run[-1] == "OMP_NUM_THREADS=3"
    _, run = steps(tmp_path, "slurm.cpus_per_task=2")
    assert "--cpus-per-task=2" in run and run[-1] == "OMP_NUM_THREADS=2"
    _, run = steps(tmp_path, "slurm.exclusive=false")  # others are on the nodes: the cluster decides
    assert not any(word.startswith("--cpus-per-task") for word in run) and run[-1] == "OMP_NUM_THREADS=1"


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_containers_see_where_the_logs_go(runtime: str, tmp_path: Path) -> None:
    container = f"slurm.container={{runtime: {runtime}, image: /i, mounts: ['/a:/b']}}"
    here, logs = tmp_path / "here", tmp_path / "logs"

    def mounts(log_dir: str) -> list[str]:
        both = steps(tmp_path, container, "slurm.environment={NAME: x, OMP_NUM_THREADS: '5'}", log_dir=log_dir)
        for step in both:
            assert step[-1] == "OMP_NUM_THREADS=5"
            assert runtime == "apptainer" or "--container-env=OMP_NUM_THREADS,NAME" in step
        (one, other) = ([word for word in step if "/a:/b" in word or word.startswith("--bind=")] for step in both)
        assert one == other
        return ",".join(one).replace("--container-mounts=", "").replace("--bind=", "").split(",")

    assert mounts(".") == mounts("logs") == ["/a:/b", f"{here}:{here}"]
    assert mounts(str(logs)) == mounts("../logs") == ["/a:/b", f"{here}:{here}", f"{logs}:{logs}"]
    (here / "link").symlink_to(logs)
    assert f"{logs}:{logs}" in mounts("link")
    assert (logs / "nemo-rlhf-sft-7" / "attempt_0").is_dir()


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@needs_slurm
@pytest.mark.usefixtures("slurm")
def test_slurm_accepts_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pyxis", "apptainer", "venv"):
        said = script(capsys, *SEVENTY, "--cluster", f"cluster/{name}", NO_ACCOUNT, "--test-only")
        assert re.match(r"Job \d+ to start at .* on nodes gpu\[1-8\] in partition batch", said)
    convert = ["convert", "import", "/hf", "/shared/a", "slurm.partition=cpu", "--test-only"]
    assert "in partition cpu" in script(capsys, *convert)
    said = refused(capsys, *SEVENTY, "trainer.num_nodes=16", "--cluster", "cluster/pyxis", NO_ACCOUNT, "--test-only")
    assert "SLURM refuses the job: " in said and "not available" in said
    assert "partition" in refused(capsys, *PPO, "slurm.partition=none", "--submit")


# What the program does, told by the name of the job and the number of the attempt.
STUB = """#!/bin/bash
attempt=${SLURM_RESTART_COUNT:-0}
case $1.$SLURM_JOB_NAME.$attempt in
preflight.early.0) touch early.preflight; exec sleep 600 ;;
preflight.early.1) exit 0 ;;
preflight.*) exec REAL "$@" ;;
esac
checkpoint() { mkdir -p "$SLURM_JOB_NAME/checkpoints/step_$((attempt + 1))"; }
case $SLURM_JOB_NAME in
vain) echo "attempt $attempt is in vain"; ((attempt)) && exit 69; kill -KILL $$ ;;
wrong) [[ $SLURM_PROCID == 1 ]] && echo "nemo-rlhf: error (rank 1): $SLURM_CPUS_PER_TASK of 4 cores."; exit 2 ;;
unhurried) trap 'checkpoint; exit 75' USR1 ;;
cancelled) trap 'checkpoint; exit 75' TERM ;;
esac
touch "$SLURM_JOB_NAME.$attempt"
case $SLURM_JOB_NAME.$attempt in
unhurried.2 | early.1) exit 0 ;;
esac
while :; do /bin/sleep 0.2; done # bash may sleep through a signal that comes just before it waits
"""
# SLURM's controller is away when a job turns to it for the first time; what waits for it has little time here.
AWAY = """#!/bin/bash
away=REAL.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
if [[ $1 != show ]] && mkdir "${away##*/}" 2>/dev/null; then
    echo "Unable to contact slurm controller" >&2
    exit 1
fi
exec REAL "$@"
"""
NAP = """#!/bin/bash
[[ $1 == 30 ]] || exec REAL "$@"
"""


@needs_slurm
@pytest.mark.usefixtures("slurm")
def test_what_becomes_of_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program that only ends, in every way there is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    real = with_program()["PATH"]
    for name, text in (("nemo-rlhf", STUB), ("squeue", AWAY), ("scontrol", AWAY), ("sleep", NAP)):
        (tmp_path / "bin" / name).write_text(text.replace("REAL", str(shutil.which(name, path=real))))
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "nemo_rlhf").mkdir()  # a checkout that the job does not run
    (tmp_path / "nemo_rlhf" / "__init__.py").write_text("raise SystemExit('not this one')\n")
    jobs = Jobs(tmp_path)

    def submit(name: str, *words: str) -> str:
        run = ["sft", "model.restore_from=.", "data.train=x", f"exp_manager.explicit_log_dir={name}", *words]
        return jobs.submit(name, *run, "slurm.max_requeues=1")

    unhurried = submit("unhurried")
    cancelled, vain = submit("cancelled"), submit("vain")
    wrong = submit("wrong", "trainer.devices=2", "slurm.exclusive=true", "slurm.options=['--export=NONE']")
    early = submit("early")
    unseen = submit("unseen", "model.restore_from=/nowhere/model", "trainer.num_nodes=2")

    # stopped twice and each time further than before: back into the queue more often than max_requeues
    jobs.wait_until((tmp_path / "unhurried.0").exists)
    program_of(unhurried, 0).parents()[1].send_signal(signal.SIGUSR1)  # all that proctrack/cgroup would signal
    jobs.wait_until((tmp_path / "cancelled.0").exists)
    subprocess.run(["scancel", cancelled], check=True)
    assert jobs.finished(cancelled) == "CANCELLED" and "back into" not in jobs.log("cancelled", cancelled)

    jobs.wait_until((tmp_path / "early.preflight").exists)
    subprocess.run(["scancel", "--signal=USR1", early], check=True)

    assert jobs.finished(vain) == "FAILED"
    log = jobs.log("vain", vain)
    assert log.count("exit code 137 after no checkpoint; back into the queue.") == 1
    assert "1 times back in the queue without a new checkpoint: this was the last attempt." in log
    assert log.endswith("ended with exit code 69 after no checkpoint.\n")
    assert re.search(r"rank 0 on n\d ended first, with exit code 137; the end of \S+/rank_0.log:\nattempt 0 is", log)
    assert f"logs of ranks are in {tmp_path}/logs/vain-{vain}/attempt_0\n" in log

    assert jobs.finished(wrong) == "FAILED"
    log = jobs.log("wrong", wrong)
    assert "with exit code 2; the end of " in log and "back into the queue" not in log
    assert log.count("nemo-rlhf: error (rank 1): 2 of 4 cores.") == 1

    assert jobs.finished(unseen) == "FAILED"
    log = jobs.log("unseen", unseen)
    assert re.search(r"^pre-flight: n2 does not see /nowhere/model \(No such file or directory\)\.$", log, re.MULTILINE)
    assert "nothing was started" in log and "back into the queue" not in log

    assert jobs.finished(early) == "COMPLETED"
    log = jobs.log("early", early)
    assert "a signal ended the pre-flight step" in log and "exit code 75 after no checkpoint; back into" in log
    for name in ("squeue", "scontrol"):
        assert log.count(f"Unable to contact slurm controller\nnemo-rlhf slurm: {name} failed, try 1 of 10.") == 1

    jobs.wait_until((tmp_path / "unhurried.1").exists)
    jobs.preempt()
    assert jobs.finished(unhurried) == "COMPLETED"
    log = jobs.log("unhurried", unhurried)
    for code, step in ((75, 1), (75, 2)):
        assert f"exit code {code} after unhurried/checkpoints/step_{step}; back into the queue." in log
    assert log.endswith("ended with exit code 0 after unhurried/checkpoints/step_2.\n")
    attempt = tmp_path / "logs" / f"unhurried-{unhurried}" / "attempt_2"
    assert {path.name for path in attempt.iterdir()} == {"preflight", "rank_0.log", "rank_0.code"}
    assert not list((tmp_path / "unhurried").glob(".preflight*"))


@needs_slurm
@pytest.mark.usefixtures("slurm")
def test_a_chain_waits_for_each_of_its_jobs(tmp_path: Path) -> None:
    ours = ["slurm.account=null", "slurm.options=[--hold]", f"slurm.log_dir={tmp_path}"]
    chain = [ROOT / "scripts" / "slurm" / "chain.sh", "cluster/pyxis", "70b", "/shared/hf/llama2-70b", "/shared"]
    done = subprocess.run([*chain, *ours], env=with_program(), capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(\w+) (\d+)", done.stdout))
    assert list(numbers) == ["convert", "sft", "reward", "ppo"]
    queue = ["squeue", "-h", "-o", "%A %j %D %l %E", "-j", ",".join(numbers.values())]
    shown = subprocess.run(queue, capture_output=True, text=True, check=True).stdout.splitlines()
    jobs = [line.split(maxsplit=4) for line in sorted(shown)]
    assert {limit for *_, limit, _ in jobs} == {"8:00:00"}
    assert [(name, nodes) for _, name, nodes, *_ in jobs] == [
        ("convert_70b", "1"), ("sft_70b", "4"), ("reward_70b", "4"), ("ppo_70b", "8")
    ]  # fmt: skip
    waits_for = [re.findall(r"afterok:(\d+)", after) for *_, after in jobs]
    assert waits_for == [[], [numbers["convert"]], [numbers["sft"]], [numbers["reward"]]]
    subprocess.run(["scancel", *numbers.values()], check=True)


def test_a_training_job_may_go_back_into_the_queue_and_a_conversion_not() -> None:
    slurm = load("slurm").slurm
    job = Job("x", ["nemo-rlhf", "sft"], "/a", "/b", resumes=True)
    assert "scontrol requeue" in render(job, slurm)
    assert "scontrol requeue" not in render(Job("x", ["nemo-rlhf", "convert"], "/a", "/b"), slurm)
