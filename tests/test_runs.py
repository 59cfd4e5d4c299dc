"""Whole PPO and SFT runs: the same for every cut, and the same whether or not they were interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REWARDS, Tiny
from tests.jobs import Job, assert_same_rollouts, error_lines, metrics_of, rollouts_of
from tests.spawn import run_distributed

WORKER = "tests.workers.run_worker:runs"
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
PP2 = ("model.pipeline_model_parallel_size=2",)
SIX = "trainer.max_steps=6"
OFFLOAD = "ppo.offload=[optimizer,critic,reference]"
CHECKPOINTS = "exp_manager.checkpoint_callback_params"
EVERY_STEP = f"{CHECKPOINTS}.every_n_train_steps=1"
BESIDE = f"{CHECKPOINTS}.async_save=true"  # of a run that is interrupted, and compared with one that is not
CONSTANT = "model.optim.sched.name=constant"  # so that a run may be made longer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run(world_size: int, payload: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run them, and return rank 0's results; no rank may meet what the program does not expect."""
    results = run_distributed(WORKER, world_size, payload, timeout_s=400)
    for rank in results:
        for one, asked in zip(rank, payload, strict=True):
            assert "traceback" not in one, f"{asked}\n{one['traceback']}"
    for codes in zip(*([one["code"] for one in rank] for rank in results), strict=True):
        assert len(set(codes)) == 1, f"ranks disagree: {codes}"
    return results[0]


@pytest.fixture(scope="module")
def two_ranks(tiny: Tiny, place: Path) -> list[dict[str, Any]]:
    """Runs on two ranks. The straight ones of six steps are also what the interrupted ones are compared with."""
    payload = [
        {"arguments": tiny.ppo(place / "tp2", *TP2, SIX)},
        {"arguments": tiny.ppo(place / "dp2", SIX)},
        {"arguments": tiny.ppo(place / "pp2", *PP2, SIX)},
        {"arguments": tiny.ppo(place / "tp2_resumed", *TP2, SIX, BESIDE), "stop_in_step": 3},
        {"arguments": tiny.ppo(place / "dp2_resumed", SIX), "stop_in_step": 3},
        {
            "arguments": tiny.ppo(place / "tp2_then_pp2", *PP2, SIX),
            "copy": (str(place / "tp2_resumed"), str(place / "tp2_then_pp2")),
        },
        {
            "arguments": tiny.ppo(place / "tp2_resumed", *TP2, SIX, BESIDE),
        },
        {
            "arguments": tiny.ppo(place / "dp2_resumed", SIX),
            "copy": (str(place / "dp2_resumed"), str(place / "dp2_then_tp1")),
        },
    ]
    return run(2, payload)


@pytest.fixture(scope="module")
def one_rank(tiny: Tiny, place: Path, two_ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def ppo(name: str, *overrides: str, **more: Any) -> dict[str, Any]:
        return {"arguments": tiny.ppo(place / name, SIX, *overrides), **more}

    payload = [
        ppo("tp1"),
        ppo("micro1", "model.micro_batch_size=1"),
        ppo("micro4", "model.micro_batch_size=4"),
        ppo("slots3", "generation.num_slots=3"),
        ppo("swap", "ppo.reference=swap"),
        ppo("offload", OFFLOAD),
        ppo("offload_resumed", OFFLOAD, stop_in_step=2),
        ppo("offload_resumed", OFFLOAD),
        ppo("dp2_then_tp1"),
        {"arguments": tiny.sft(place / "sft")},
        {"arguments": tiny.sft(place / "sft_resumed"), "stop_in_step": 2},
        {"arguments": tiny.sft(place / "sft_resumed")},
        ppo("kept", CONSTANT, EVERY_STEP, f"{CHECKPOINTS}.save_top_k=1", "trainer.max_steps=5"),
        ppo(
            "damaged",
            CONSTANT,
            EVERY_STEP,
            copy=(str(place / "kept"), str(place / "damaged")),
            damage=str(place / "damaged/checkpoints/step_5/policy/weights/__0_0.distcp"),
        ),
        ppo("nan", CONSTANT, EVERY_STEP, BESIDE, nan_in_step=2),
        ppo("nan", CONSTANT, EVERY_STEP),
        ppo("graph", "model.micro_batch_size=8", "ppo.keep_graph=true", "ppo.reference=swap"),
    ]
    return run(1, payload)


@pytest.fixture(scope="module")
def four_ranks(tiny: Tiny, place: Path) -> list[dict[str, Any]]:
    return run(4, [{"arguments": tiny.ppo(place / "tp2_pp2", *TP2, *PP2, SIX)}])


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-4, abs=5e-6), f"{name} in step {other['step']}"


def test_metrics_are_those_that_the_configuration_asks_for(place: Path, one_rank: list[dict[str, Any]]) -> None:
    assert [one["code"] for one in one_rank] == [0, 0, 0, 0, 0, 0, 75, 0, 0, 0, 75, 0, 0, 0, 2, 0, 0]
    rows = [json.loads(line) for line in (place / "tp1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))
    sweep = {f"val/{name}@temperature={value}" for name in ("reward", "response_length") for value in ("0.9", "1.2")}
    assert {"val/reward", *sweep} <= rows[0].keys()
    assert rows[0]["val/reward"] == max(rows[0]["val/reward@temperature=0.9"], rows[0]["val/reward@temperature=1.2"])
    promised = [
        "reward/mean",
        "reward/std",
        "kl/mean",
        "kl/coef",
        "entropy/mean",
        "loss/policy",
        "loss/value",
        "ratio/mean",
        "clipfrac/policy",
        "clipfrac/value",
        "value/explained_variance",
        "grad_norm/policy",
        "grad_norm/critic",
        "lr/policy",
        "response_length/mean",
        "eos/share",
        "check/ratio_step0",
        "check/kl_step0",
        "time/rollout_s",
        "time/score_s",
        "time/experience_s",
        "time/update_s",
        "time/total_s",
        "perf/generated_tokens_per_s",
        "perf/trained_tokens_per_s",
        "memory/peak_mib",
    ]
    for row in rows[1:]:
        assert set(promised) <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    assert len({row["kl/coef"] for row in rows[1:]}) == 6, "the KL coefficient must adapt"
    assert len({row["lr/policy"] for row in rows[1:]}) > 3, "the learning rate must follow its schedule"
    assert rows[-1]["kl/mean"] != 0.0


@pytest.mark.parametrize("cut", ["tp2", "dp2", "pp2", "tp2_pp2", "micro1", "micro4", "slots3", "swap", "graph"])
def test_every_cut_samples_and_learns_the_same(
    cut: str,
    place: Path,
    one_rank: list[dict[str, Any]],
    two_ranks: list[dict[str, Any]],
    four_ranks: list[dict[str, Any]],
) -> None:
    assert_close(metrics_of(place / cut), metrics_of(place / "tp1"))
    assert_same_rollouts(place / cut, place / "tp1")
    expected = rollouts_of(place / "tp1")
    assert len(expected) == 6
    assert len({sample["response"] for sample in expected["step_1"]}) > 8, "samples must differ for this to mean much"


@pytest.mark.parametrize(
    "cut", ["tp1", "tp2", "dp2", "pp2", "tp2_pp2", "micro1", "micro4", "slots3", "swap", "offload", "graph"]
)
def test_step_0_is_exact(
    cut: str,
    place: Path,
    one_rank: list[dict[str, Any]],
    two_ranks: list[dict[str, Any]],
    four_ranks: list[dict[str, Any]],
) -> None:
    first = metrics_of(place / cut)[1]
    assert first["check/ratio_step0"] == 1.0
    assert first["check/kl_step0"] == 0.0
    assert first["kl/mean"] == 0.0


def test_offloading_changes_no_bit(place: Path, one_rank: list[dict[str, Any]]) -> None:
    assert metrics_of(place / "offload") == metrics_of(place / "tp1")
    assert metrics_of(place / "offload_resumed") == metrics_of(place / "tp1")


@pytest.mark.parametrize("cut", ["tp2", "dp2"])
def test_resuming_changes_no_bit(cut: str, place: Path, two_ranks: list[dict[str, Any]]) -> None:
    assert [one["code"] for one in two_ranks] == [0, 0, 0, 75, 75, 0, 0, 0]
    assert metrics_of(place / f"{cut}_resumed") == metrics_of(place / cut)
    assert rollouts_of(place / f"{cut}_resumed") == rollouts_of(place / cut)


@pytest.mark.parametrize(("resumed", "straight"), [("tp2_then_pp2", "tp2"), ("dp2_then_tp1", "tp1")])
def test_resuming_with_another_cut(
    resumed: str, straight: str, place: Path, two_ranks: list[dict[str, Any]], one_rank: list[dict[str, Any]]
) -> None:
    assert_close(metrics_of(place / resumed), metrics_of(place / straight))
    assert_same_rollouts(place / resumed, place / straight)


def test_resuming_sft_changes_no_bit(place: Path, one_rank: list[dict[str, Any]]) -> None:
    rows = metrics_of(place / "sft")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert metrics_of(place / "sft_resumed") == rows


def test_the_last_and_the_best_are_kept(place: Path, one_rank: list[dict[str, Any]]) -> None:
    rows = metrics_of(place / "kept")
    best = max(rows[1:], key=lambda row: (row["val/reward"], row["step"]))["step"]
    directory = place / "kept" / "checkpoints"
    stored = {path.name for path in directory.iterdir()}
    assert stored == {"step_4", "step_5", f"step_{best}", "best"}
    assert (directory / "best").readlink() == Path(f"step_{best}")


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(place: Path, one_rank: list[dict[str, Any]]) -> None:
    (warning,) = [line for line in one_rank[13]["stderr"].splitlines() if line.startswith("nemo-rlhf: warning")]
    assert "damaged/checkpoints/step_5 is damaged" in warning
    assert "policy/weights/__0_0.distcp" in warning and "The one before is used." in warning
    stored = {path.name for path in (place / "damaged" / "checkpoints").iterdir()}
    assert {"step_5.damaged", "step_5", "step_6"} <= stored, "what is damaged is not among the last two"
    assert "step_5.damaged: delete it." in warning
    rows = metrics_of(place / "damaged")
    assert [row["step"] for row in rows] == list(range(7))
    assert rows[:6] == metrics_of(place / "kept"), "step 5 was done again, to the same bit"


def test_a_nan_loss_is_not_applied(place: Path, one_rank: list[dict[str, Any]]) -> None:
    (line,) = error_lines(one_rank[14]["stderr"])
    assert "loss/policy is NaN in step 2: the update was not applied" in line
    assert "bad_batch_step_2.pt" in line
    assert one_rank[14]["weights_kept"]
    batch = torch.load(place / "nan" / "bad_batch_step_2.pt", weights_only=True)
    assert batch["role"] == "policy"
    assert batch["tokens"].shape[0] == 8 and batch["advantages"].shape == batch["tokens"].shape
    assert [row["step"] for row in metrics_of(place / "nan")] == list(range(7)), "it went on from step 1"


def catches(process: Any, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_job_survives_kills_and_signals(tiny: Tiny, place: Path, two_ranks: list[dict[str, Any]]) -> None:
    """Five starts of one command; the result is that of the run nobody disturbed."""
    run_dir, hold = place / "disturbed", place / "hold"
    checkpoints, reached = run_dir / "checkpoints", hold.with_suffix(".reached")
    secret = "exp_manager.wandb_logger_kwargs={api_key: S3CRET, dir: 'http://S3CRET@h'}"  # nothing uses it
    arguments = tiny.ppo(run_dir, *TP2, SIX, EVERY_STEP, "trainer.devices=2", f"reward.function={REWARDS}:held", secret)

    def start() -> Job:
        return Job(arguments, place, REWARD_HOLD=str(hold))

    def newest() -> int:
        return max((int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*[0-9]")), default=0)

    job = start()  # killed in the middle of a step
    job.wait_until(lambda: newest() == 1)
    hold.touch()
    job.wait_until(reached.exists)
    job.ranks()[1].kill()
    assert job.wait() == 128 + signal.SIGKILL, job.stderr
    assert "nemo-rlhf: rank 1 was killed by SIGKILL" in job.stderr
    hold.unlink()
    reached.unlink()

    before = newest()
    job = start()  # killed in the middle of saving
    job.wait_until((checkpoints / f"step_{before + 1}.partial" / "policy" / "weights").exists, interval_s=0.001)
    job.ranks()[0].kill()
    assert job.wait() == 128 + signal.SIGKILL, job.stderr
    assert "nemo-rlhf: rank 0 was killed by SIGKILL" in job.stderr
    assert newest() == before, "what was half written must not be taken for a checkpoint"

    hold.touch()
    job = start()  # told to stop in the middle of a step
    job.wait_until(reached.exists)
    job.process.send_signal(signal.SIGTERM)
    hold.unlink()
    assert job.wait() == 75, job.stderr
    assert "nemo-rlhf: SIGTERM ended the run after step " in job.stderr
    assert newest() == before + 1

    job = start()  # told to stop before there is a step
    job.wait_until(lambda: sum(catches(rank, signal.SIGUSR1) for rank in job.ranks().values()) == 2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 75, job.stderr
    assert "nemo-rlhf: SIGUSR1 ended the run after step " in job.stderr
    assert newest() == before + 2

    job = start()
    assert job.wait() == 0, job.stderr
    assert job.stdout == "" and error_lines(job.stderr) == []
    assert metrics_of(run_dir) == metrics_of(place / "tp2")
    assert rollouts_of(run_dir) == rollouts_of(place / "tp2")
    assert list(checkpoints.glob("*.partial")) == []
    assert {path.name for path in run_dir.iterdir()} == {
        "checkpoints", "config.yaml", "logs", "metrics.jsonl", "report.html", "rollouts", "validation",
    }  # fmt: skip
    assert "api_key: '***'" in (run_dir / "config.yaml").read_text()
    assert (run_dir / "config.yaml").stat().st_mode & 0o777 == 0o600
    assert "max_steps" in (run_dir / "logs" / "cmd-args.log").read_text()
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert [path for path in files if b"S3CRET" in path.read_bytes()] == []


def test_a_rank_that_fails_alone_leaves_nobody_waiting(tmp_path: Path) -> None:
    first, second = run_distributed("tests.workers.run_worker:fail_alone", 2, str(tmp_path), timeout_s=120)
    assert first == second
    assert first.startswith(f"the checkpoint {tmp_path / 'checkpoint'} could not be written (rank 0: ")
    assert "No space left on device" in first and "MiB were free" in first
    assert not (tmp_path / "checkpoint").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory that holds 6 MiB: five checkpoints."""
    disk = tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_spares_the_checkpoint_before(tiny: Tiny, small_disk: Path, tmp_path: Path) -> None:
    arguments = tiny.ppo(small_disk.parent, *TP2, EVERY_STEP, "trainer.devices=2", f"reward.function={REWARDS}:filling")
    job = Job(arguments, tmp_path, REWARD_FILLS=str(small_disk))
    assert job.wait() == 2, job.stderr
    (line,) = error_lines(job.stderr)
    assert "checkpoints/step_2 could not be written" in line and "No space left on device" in line
    assert "Traceback" not in job.stderr
    assert {path.name for path in small_disk.iterdir()} == {"step_1", "filler"}
    (small_disk / "filler").unlink()
    job = Job(arguments, tmp_path, REWARD_FILLS=str(small_disk))
    assert job.wait() == 0, job.stderr
    assert "warning" not in job.stderr
    assert [row["step"] for row in metrics_of(small_disk.parent)] == [0, 1, 2, 3]
