"""Whole PPO and SFT runs: the same for every cut, and the same whether or not they were interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tiny
from tests.jobs import metrics_of, rollouts_of
from tests.spawn import run_distributed

WORKER = "tests.workers.run_worker:runs"
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
PP2 = ("model.pipeline_model_parallel_size=2",)
SIX = "trainer.max_steps=6"
OFFLOAD = "ppo.offload=[optimizer,critic,reference]"
KEEP = "exp_manager.checkpoint_callback_params"


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
        {"arguments": tiny.ppo(place / "tp2_resumed", *TP2, SIX), "stop_in_step": 3},
        {"arguments": tiny.ppo(place / "dp2_resumed", SIX), "stop_in_step": 3},
        {
            "arguments": tiny.ppo(place / "tp2_then_pp2", *PP2, SIX),
            "copy": (str(place / "tp2_resumed"), str(place / "tp2_then_pp2")),
        },
        {
            "arguments": tiny.ppo(place / "tp2_resumed", *TP2, SIX),
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
    assert [one["code"] for one in one_rank] == [0, 0, 0, 0, 0, 0, 75, 0, 0, 0, 75, 0]
    rows = [json.loads(line) for line in (place / "tp1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(7))
    sweep = {f"val/{name}@temperature={value}" for name in ("reward", "response_length") for value in ("0.9", "1.2")}
    assert {"val/reward", *sweep} <= rows[0].keys()
    assert rows[0]["val/reward"] == max(rows[0]["val/reward@temperature=0.9"], rows[0]["val/reward@temperature=1.2"])
    promised = """reward/mean reward/std kl/mean kl/coef entropy/mean loss/policy loss/value ratio/mean clipfrac/policy
        clipfrac/value value/explained_variance grad_norm/policy grad_norm/critic lr/policy response_length/mean eos/share
        check/ratio_step0 check/kl_step0 time/rollout_s time/score_s time/experience_s time/update_s time/total_s
        perf/generated_tokens_per_s perf/trained_tokens_per_s memory/peak_mib""".split()
    for row in rows[1:]:
        assert set(promised) <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
    assert len({row["kl/coef"] for row in rows[1:]}) == 6, "the KL coefficient must adapt"
    assert len({row["lr/policy"] for row in rows[1:]}) > 3, "the learning rate must follow its schedule"
    assert rows[-1]["kl/mean"] != 0.0


@pytest.mark.parametrize("cut", ["tp2", "dp2", "pp2", "tp2_pp2", "micro1", "micro4", "slots3", "swap"])
def test_every_cut_samples_and_learns_the_same(
    cut: str,
    place: Path,
    one_rank: list[dict[str, Any]],
    two_ranks: list[dict[str, Any]],
    four_ranks: list[dict[str, Any]],
) -> None:
    assert_close(metrics_of(place / cut), metrics_of(place / "tp1"))
    found, expected = rollouts_of(place / cut), rollouts_of(place / "tp1")
    assert found == expected and len(expected) == 6
    assert len({sample["response"] for sample in expected["step_1"]}) > 8, "samples must differ for this to mean much"


@pytest.mark.parametrize("cut", ["tp1", "tp2", "dp2", "pp2", "tp2_pp2", "micro1", "micro4", "slots3", "swap", "offload"])
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
    assert rollouts_of(place / resumed) == rollouts_of(place / straight)


def test_resuming_sft_changes_no_bit(place: Path, one_rank: list[dict[str, Any]]) -> None:
    rows = metrics_of(place / "sft")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    assert metrics_of(place / "sft_resumed") == rows
