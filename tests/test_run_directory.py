"""One run, one directory: who may start in it, what may differ at a resumption, and what people's code leaves there."""

from __future__ import annotations

import datetime
import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_rlhf.algorithms.base import Algorithm
from nemo_rlhf.algorithms.samples import OURS, beside_ours
from nemo_rlhf.cli import run_lock
from nemo_rlhf.cli.run_directory import _check_array_job, _contents, _make, run_date
from nemo_rlhf.cli.run_lock import LOCK, Holder, locked
from nemo_rlhf.config import load
from nemo_rlhf.config.changes import FIXED, changes, fixed_values, not_allowed
from nemo_rlhf.config.keys import schema_keys
from nemo_rlhf.config.schema import ILQLConfig, PPOConfig, RewardModelConfig, RFTConfig, SFTConfig
from nemo_rlhf.data.checksum import checksum
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.checkpoint import _remedy
from nemo_rlhf.types import Dialogue, Pair, Prompt, ScoredText, Text
from tests.conftest import Tiny
from tests.jobs import ROOT, Job, error_lines, metrics_of, rollouts_of
from tests.spawn import run_distributed

UNRULY = "tests.workers.unruly"
HOLD = "from nemo_rlhf.cli.run_lock import locked\nfrom pathlib import Path\nimport sys, time\n"
HOLD += "with locked(Path(sys.argv[1])):\n    print('taken', flush=True)\n    time.sleep(600)\n"


# ---- the lock


@pytest.fixture
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)


@pytest.fixture
def first(tmp_path: Path, no_job: None) -> Iterator[subprocess.Popen[str]]:
    """A process of job 41 that has ``tmp_path``."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "41"}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()


def refusal(directory: Path) -> str:
    with pytest.raises(OSError, match="A run goes on in") as caught, locked(directory):
        pass
    assert caught.value.errno is None
    return str(caught.value)


def write_holder(directory: Path, **changes: Any) -> Holder:
    """The lock file that a process of another host has left."""
    elsewhere = {"host": "node9", "boot": "another", "pid": 1, "job": None, "restarts": 0}
    holder = replace(Holder.me(), **(elsewhere | changes))
    (directory / LOCK).write_text(json.dumps(asdict(holder)))
    return holder


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path, first: subprocess.Popen[str]) -> None:
    sentence = refusal(tmp_path)
    assert f"process {first.pid} on {Holder.me().host} of SLURM job 41, since " in sentence
    assert str(tmp_path) in sentence and "\n" not in sentence
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_that_its_process_has_lost_by_a_closed_file(
    tmp_path: Path, first: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any reading of the file in that process does."""
    monkeypatch.setattr(run_lock, "_lock", lambda file: True)
    assert f"process {first.pid} on " in refusal(tmp_path)
    first.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for it
    with locked(tmp_path):
        pass


def test_a_requeued_job_waits_for_its_own_last_process(
    tmp_path: Path, first: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    refusal(tmp_path)  # two programs at a time in one job are no requeuing
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(time, "sleep", lambda _: first.kill())
    assert first.poll() is None
    with locked(tmp_path):
        assert first.wait() == -signal.SIGKILL  # it was waited for
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_requeued_job_takes_over_from_another_host(tmp_path: Path, no_job: None, monkeypatch: Any) -> None:
    write_holder(tmp_path, job="41")
    monkeypatch.setenv("PATH", "")  # no squeue
    assert "process 1 on node9 of SLURM job 41" in refusal(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    refusal(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["restarts"] == 2


@pytest.mark.parametrize(
    ("said", "code", "free"),
    [
        ("RUNNING", 0, False),
        ("COMPLETING", 0, False),
        ("SUSPENDED", 0, False),
        ("PENDING", 0, True),
        ("", 0, True),
        ("slurm_load_jobs error: Invalid job id specified", 1, True),
        ("slurm_load_jobs error: Unable to contact slurm controller", 1, False),
    ],
)
def test_what_slurm_says_of_the_other_job(
    said: str, code: int, free: bool, tmp_path: Path, no_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "squeue"
    stub.write_text(f"#!/bin/sh\necho '{said}' >&{2 if code else 1}\nexit {code}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    write_holder(tmp_path, job="41")
    if free:
        with locked(tmp_path):
            pass
    else:
        assert "job 41" in refusal(tmp_path)


def test_another_host_is_believed_while_it_gives_signs_of_life(
    tmp_path: Path, no_job: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_holder(tmp_path)
    assert "process 1 on node9, since" in refusal(tmp_path)
    old = time.time() - 2 * run_lock.SILENCE_S
    os.utime(tmp_path / LOCK, (old, old))
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (old, old))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK).stat().st_mtime < old + 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > old + 10


def test_a_file_system_without_locks(tmp_path: Path, no_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    monkeypatch.setattr(run_lock, "_POLL_S", 0.01)
    me = Holder.me()
    write_holder(tmp_path, host=me.host, boot=me.boot, pid=os.getppid(), started=run_lock._started(os.getppid()))
    assert f"process {os.getppid()} on {me.host}" in refusal(tmp_path)
    write_holder(tmp_path, host=me.host, boot=me.boot, pid=os.getppid(), started="1")  # that number was another's
    with locked(tmp_path):
        pass
    (tmp_path / LOCK).write_text('{"host": "no')  # of a process that was killed while it wrote
    with locked(tmp_path):
        pass


def test_who_deletes_the_file_takes_nobody_else_s(tmp_path: Path, no_job: None) -> None:
    with locked(tmp_path):
        (tmp_path / LOCK).unlink()
        other = write_holder(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text()) == asdict(other)


# ---- the directory


def test_tasks_of_an_array_job_have_directories_of_their_own(no_job: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "8")
    for shared in ("runs/ppo", "runs/ppo_13", "runs/30"):
        with pytest.raises(OSError, match=r"task 3 of an array job of 8, .*oc\.env:SLURM_ARRAY_TASK_ID"):
            _check_array_job(Path(shared))
    for own in ("runs/ppo_3", "runs/3/ppo", "runs/seed3", "runs/seed_003"):
        _check_array_job(Path(own))
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "1")
    _check_array_job(Path("runs/ppo"))


def test_a_directory_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run cannot be made \(Not a directory\): choose another") as caught:
        _make(tmp_path / "file" / "run")
    assert caught.value.errno is None
    with pytest.raises(OSError, match=r"cannot be made \(File exists\)"):
        _make(tmp_path / "file")
    for number, name in enumerate(("checkpoints", "rollouts", "validation", "logs")):
        place = tmp_path / f"run_{number}"
        place.mkdir()
        (place / name).touch()
        with pytest.raises(OSError, match=f"{name} is in the way: the run needs a directory"):
            _make(place)
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(OSError, match=f"{name} is in the way: the run needs a file"):
            _make(tmp_path / name)
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "checkpoints").symlink_to("nowhere")
    with pytest.raises(OSError, match="checkpoints is in the way"):
        _make(tmp_path / "dangling")
    (tmp_path / "kept").mkdir()
    for name in ("config.yaml", "report.html", "metrics.jsonl"):
        (tmp_path / "kept" / name).touch()
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).suffix not in (".yaml", ".html"))
    _make(tmp_path / "kept")  # new files take their places
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).suffix != ".jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written"):
        _make(tmp_path / "kept")
    monkeypatch.undo()
    _make(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []


def test_what_is_said_of_a_save_that_failed() -> None:
    assert "deleted what was being written" in _remedy(f"rank 1: {OSError(errno.ENOENT, 'No such file')}")
    assert _remedy(f"rank 0: {OSError(errno.ENOSPC, 'No space left')}").startswith("free space")
    assert "make it writable" in _remedy(str(OSError(errno.EACCES, "Permission denied")))


# ---- what may change


def test_fixed_keys_exist() -> None:
    known = set().union(
        *(schema_keys(kind) for kind in (PPOConfig, SFTConfig, ILQLConfig, RFTConfig, RewardModelConfig))
    )
    assert set(FIXED) <= known


def test_fixed_keys_are_compared_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["model.restore_from=m", "exp_manager.explicit_log_dir=r", "data.train=t", "seed=${oc.env:MY_SEED}"]
    found = []
    for seed in ("1", "2"):
        monkeypatch.setenv("MY_SEED", seed)
        found.append(fixed_values(load("sft", base)))
    assert changes(*found) == {"seed": (1, 2)}


def test_changes_are_found_key_by_key() -> None:
    before = {"seed": 1, "model": {"optim": {"lr": 0.1}, "gone": 1}, "reward": {"sources": [{"weight": 1}]}}
    now = {"seed": 2, "model": {"optim": {"lr": 0.2}, "new": 2}, "reward": {"sources": [{"weight": 2}]}, "more": 1}
    now["exp_manager"], before["exp_manager"] = {"allow_changes": True}, {"allow_changes": False}
    found = changes(before, now)
    assert found == {
        "seed": (1, 2),
        "model.optim.lr": (0.1, 0.2),
        "reward.sources": ([{"weight": 1}], [{"weight": 2}]),
    }
    assert not_allowed(found, False) == ["seed"]
    assert not_allowed([*found, "data", "ppo.advantage"], ["data", "ppo"]) == ["seed"]
    assert not_allowed([*found, "data"], True) == []


@pytest.mark.parametrize(
    ("given", "words"), [("yes", "must be true, false, or a list"), ("[sed]", "no configuration key")]
)
def test_what_may_change_is_named_by_keys(given: str, words: str) -> None:
    base = ["model.restore_from=m", "exp_manager.explicit_log_dir=r", "data.train=t"]
    with pytest.raises(ValueError, match=f"exp_manager.allow_changes.*{words}"):
        load("sft", [*base, f"exp_manager.allow_changes={given}"])
    for fine in ("true", "[seed,model.optim,data]"):
        load("sft", [*base, f"exp_manager.allow_changes={fine}"])


def test_the_checksum_sees_ids_masks_rewards_and_fields() -> None:
    records: list[Any] = [
        Prompt((1, 2), "ab", {"answer": "x"}),
        Prompt((1, 3), "ab", {"answer": "x"}),
        Prompt((1, 2), "ab", {"answer": "y"}),
        Prompt((1, 2), "ab", {"answer": ["x"]}),
        Text((1, 2), (False, True)),
        Text((1, 2), (True, True)),
        Dialogue((1, 2), (False, True), (0.0, 1.0)),
        Dialogue((1, 2), (False, True), (0.0, 1.5)),
        Dialogue((1, 2), (False, True), (0.0, 1.0), done=False),
        Pair((1,), (2,)),
        Pair((2,), (1,)),
        Pair((1,), (2,), 0.5),
        ScoredText((1, 2), 1.0),
        ScoredText((1, 2), 2.0),
        Prompt((), "\udcff", {"lock": object(), 3: {"b": 1, "a": 2}}),
    ]
    sums = [checksum([record]) for record in records]
    assert len(set(sums)) == len(sums)
    assert checksum(records) != checksum(records[::-1])
    assert sums[-1] == checksum([Prompt((), "\udcff", {3: {"a": 2, "b": 1}, "lock": object()})])


def test_ranks_that_read_other_data_are_named() -> None:
    first, second = run_distributed("tests.workers.run_worker:other_data", 2, None, timeout_s=120)
    assert first == second
    assert first.startswith("rank 1 on ") and "other training or validation data than rank 0 on " in first


def test_a_run_keeps_the_day_of_its_first_start(tmp_path: Path) -> None:
    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    assert run_date(tmp_path) == datetime.date.today()
    for step, origin in ((2, {"date": "2026-01-03"}), (10, {"date": "2026-01-03"}), (11, [])):
        directory = tmp_path / "checkpoints" / f"step_{step}"
        directory.mkdir(parents=True)
        (directory / "identity.json").write_text(json.dumps({"origin": origin}))
    assert run_date(tmp_path) == datetime.date(2026, 1, 3)
    for directory in (tmp_path / "checkpoints").iterdir():
        (directory / "identity.json").write_text(json.dumps({"origin": {}}))  # of an earlier version
    assert run_date(tmp_path) == datetime.date.today()


def test_a_model_is_known_by_what_its_directory_holds(tmp_path: Path) -> None:
    for name, layers in (("here", 2), ("there", 2), ("other", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": layers}))
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 100)
    here, there, other = (_contents(tmp_path / name) for name in ("here", "there", "other"))
    assert here == there != other and here is not None
    (tmp_path / "there" / "model.safetensors").write_bytes(b"x" * 101)
    assert _contents(tmp_path / "there") != here
    assert _contents(None) is None is _contents(tmp_path / "absent")


# ---- fields, gradients


def test_fields_that_are_named_as_ours_are_kept() -> None:
    fields = {"answer": 1, "score": 2, "kl": 3, "metadata": {"a": 4}, "step": 5}
    assert beside_ours(fields) == {"answer": 1, "step": 5, "metadata": {"score": 2, "kl": 3, "metadata": {"a": 4}}}
    assert beside_ours({"answer": 1}) == {"answer": 1}
    assert set(OURS) >= {"prompt", "response", "score", "kl", "metadata"}


def test_a_step_without_a_gradient_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    class Still(Algorithm):
        pass

    Still.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    algorithm = Still(Path("r"), 3, 0, None, Path("t"))  # type: ignore[abstract]
    for norms in ({"policy": [0.0, 0.1], "critic": [0.2]}, {}, {"policy": [0.0, 0.0], "critic": [0.1]}):
        algorithm.gradient_norms = norms
        algorithm._tell_of_no_gradients(2)
    algorithm._tell_of_no_gradients(3)
    (warning,) = recwarn.list
    assert str(warning.message).startswith("the gradient of the policy was exactly 0 in step 2")


# ---- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("directory")


@pytest.fixture(scope="module")
def runs(tiny: Tiny, place: Path) -> dict[str, dict[str, Any]]:
    """Runs of one process, by what they show."""
    records = [json.loads(line) for line in tiny.prompts.read_text().splitlines()]
    named = [{**one, "score": 0.5, "kl": None, "response": "mine", "step": 7, "metadata": "x"} for one in records]
    (place / "named.jsonl").write_text("".join(json.dumps(one) + "\n" for one in named))
    (place / "same.jsonl").write_text(tiny.train.read_text())
    (place / "other.jsonl").write_text(tiny.train.read_text().replace('"response": "', '"response": "z'))
    two = ("trainer.max_steps=2", "trainer.val_check_interval=2", "ppo.epochs=1", "generation.temperature=1.0")
    still = ("trainer.max_steps=1", "ppo.advantage=rloo", "ppo.entropy_coef=0", "ppo.reward_scaling=none")
    fixed, slow, other = "model.optim.sched.name=constant", "model.optim.lr=1e-4", f"data.train={place}/other.jsonl"
    prompts = (f"data.prompts={place}/named.jsonl", "data.validation_prompts=null", "ppo.keep_rollouts=1")

    def ppo(name: str, function: str, *overrides: str) -> list[str]:
        return tiny.ppo(place / name, *two, f"reward.function={function}", *overrides)

    def sft(steps: int, *overrides: str) -> list[str]:
        return tiny.sft(place / "sft", fixed, f"trainer.max_steps={steps}", *overrides)

    payload = {
        "innocent": ppo("innocent", f"{UNRULY}:innocent"),
        "unruly": ppo("unruly", f"{UNRULY}_module:unruly"),
        "quitting": ppo("quitting", f"{UNRULY}:quitting"),
        "still": ppo("still", f"{UNRULY}:constant", *still),
        "other reward": ppo("innocent", f"{UNRULY}:other"),
        "fields": ppo("fields", f"{UNRULY}:with_fields", *prompts),
        "start": sft(1),
        "again": sft(1),
        "longer": sft(2, slow),
        "seed": sft(3, slow, "seed=5", "data.shuffle=false"),
        "data": sft(3, slow, other),
        "same data": sft(2, slow, f"data.train={place}/same.jsonl"),
        "allowed": sft(3, slow, other, "seed=5", "exp_manager.allow_changes=[data,seed]"),
        "other model": sft(4, other, "seed=5", "model.init=pretrained"),
        "generate": [
            "generate", str(place / "sft" / "checkpoints" / "step_2"), "--prompts", f"{place}/named.jsonl",
            "--out", f"{place}/responses.jsonl", "generation.max_new_tokens=3",
        ],
    }  # fmt: skip
    found = run_distributed(
        "tests.workers.run_worker:runs", 1, [{"arguments": one} for one in payload.values()], timeout_s=400
    )
    results = dict(zip(payload, found[0], strict=True))
    for name, one in results.items():
        assert "traceback" not in one, f"{name}\n{one['traceback']}"
    return results


def weights(run_dir: Path) -> str:
    stored = sorted((run_dir / "checkpoints" / "step_2").rglob("*.distcp"))
    assert stored
    return hashlib.sha256(b"".join(file.read_bytes() for file in stored)).hexdigest()


def test_a_run_is_as_if_an_unruly_module_were_none(runs: dict[str, dict[str, Any]], place: Path) -> None:
    assert (runs["innocent"]["code"], runs["unruly"]["code"]) == (0, 0), runs["unruly"]["stderr"]
    assert metrics_of(place / "unruly") == metrics_of(place / "innocent")
    assert rollouts_of(place / "unruly") == rollouts_of(place / "innocent")
    assert weights(place / "unruly") == weights(place / "innocent")
    assert all(one["grad_norm/policy"] > 0 for one in metrics_of(place / "unruly") if "grad_norm/policy" in one)


def test_a_function_that_calls_exit_gets_a_sentence_and_2(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["quitting"]["code"] == 2
    (line,) = error_lines(runs["quitting"]["stderr"])
    assert "The reward function tests.workers.unruly.quitting called sys.exit(3), which may not end a run" in line


def test_a_run_that_learns_nothing_says_so(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["still"]["code"] == 0
    assert runs["still"]["stderr"].count("the gradient of the policy was exactly 0 in step 1") == 1
    assert "gradient of" not in runs["innocent"]["stderr"]


def test_people_s_fields_survive_in_rollouts_and_responses(runs: dict[str, dict[str, Any]], place: Path) -> None:
    assert (runs["fields"]["code"], runs["generate"]["code"]) == (0, 0)
    assert [path.name for path in (place / "fields" / "rollouts").iterdir()] == ["step_2.jsonl"]
    for line in (place / "fields" / "rollouts" / "step_2.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["metadata"] == {"score": 0.5, "kl": None, "response": "mine", "metadata": "x"}
        assert record["step"] == 7 and record["score"] == record["response"].count("a")
    for line in (place / "responses.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["metadata"] == {"response": "mine", "metadata": "x"}
        assert (record["score"], record["step"]) == (0.5, 7) and record["response"] != "mine"


def test_what_has_changed_is_told_and_what_cannot_be_meant_is_refused(
    runs: dict[str, dict[str, Any]], place: Path, tiny: Tiny
) -> None:
    def said(name: str, code: int) -> str:
        assert runs[name]["code"] == code, runs[name]["stderr"]
        return str(runs[name]["stderr"])

    assert "have changed" not in said("start", 0) + said("again", 0)
    longer = said("longer", 0)
    assert "step_1 there have changed:\nnemo-rlhf:   trainer.max_steps: 1 -> 2\n" in longer
    assert "nemo-rlhf:   model.optim.lr: 0.003 -> 0.0001\n" in longer
    refused = said("seed", 2)
    assert "nemo-rlhf:   seed: 1234 -> 5\n" in refused
    (line,) = error_lines(refused)
    assert "holds another run: seed was 1234 and is 5, data.shuffle was true and is false." in line
    assert "exp_manager.allow_changes=[seed,data.shuffle] goes on all the same" in line
    refused = said("data", 2)
    assert f"data.train: {tiny.train} -> {place}/other.jsonl\n" in refused
    assert "the training data is other than before (checksum " in refused
    assert "holds another run: its training data differs." in refused and "allow_changes=[data]" in refused
    assert f"data.train: {tiny.train} -> {place}/same.jsonl\n" in said("same data", 0)
    assert "seed: 1234 -> 5" in said("allowed", 0)
    assert "model.init was random and is pretrained" in said("other model", 2)
    assert "the reward function: tests.workers.unruly:innocent -> tests.workers.unruly:other" in said("other reward", 0)


def test_checkpoints_have_the_day(runs: dict[str, dict[str, Any]], place: Path) -> None:
    assert runs["again"]["code"] == 0
    identity = json.loads((place / "sft" / "checkpoints" / "step_2" / "identity.json").read_text())
    assert datetime.date.fromisoformat(identity["origin"]["date"]) <= datetime.date.today()


def test_the_configuration_of_every_start_is_kept(runs: dict[str, dict[str, Any]], place: Path) -> None:
    kept = sorted((place / "sft").glob("config*.yaml"), key=lambda path: (len(path.name), path.name))
    assert [path.name for path in kept] == ["config.yaml", "config_1.yaml", "config_2.yaml", "config_3.yaml"]
    steps = [yaml.safe_load(path.read_text())["trainer"]["max_steps"] for path in kept]
    assert steps == [3, 1, 2, 2]  # the last one; a start that changes nothing and those that were refused left none
    # nor do refused starts move the logs of those before aside: five went on
    assert len(list((place / "sft" / "logs").glob("run_*"))) == 4


def test_only_one_of_two_starts_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    """The second is refused, and does not touch the first; a kill frees the directory; the requeued job takes over."""
    run_dir, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    arguments = tiny.ppo(run_dir, "trainer.max_steps=1", "reward.function=tests.workers.rewards:held")
    one = Job(arguments, tmp_path, REWARD_HOLD=str(hold), SLURM_JOB_ID="77")
    one.wait_until(hold.with_suffix(".reached").exists)
    (run_dir / "checkpoints" / "step_1.partial").mkdir(parents=True)
    two = Job(arguments, tmp_path, REWARD_HOLD=str(hold))
    assert two.wait() == 2, two.stderr
    (line,) = error_lines(two.stderr)
    assert f"A run goes on in {run_dir} (process {one.process.pid} on " in line and "of SLURM job 77" in line
    assert (run_dir / "checkpoints" / "step_1.partial").exists()
    one.process.kill()
    one.wait()
    hold.unlink()
    holder = json.loads((run_dir / LOCK).read_text())
    (run_dir / LOCK).write_text(json.dumps({**holder, "host": "node9", "boot": "another"}))
    three = Job(arguments, tmp_path, REWARD_HOLD=str(hold), SLURM_JOB_ID="77", SLURM_RESTART_COUNT="1")
    assert three.wait() == 0, three.stderr
    assert not (run_dir / LOCK).exists() and len(metrics_of(run_dir)) > 0
