"""RFT: which samples are learned from, what is learned from them, under every cut and after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import nemo_rlhf
from nemo_rlhf.algorithms.rft import RFT, best_rows, percentiles
from nemo_rlhf.cli import main
from nemo_rlhf.config.schema import RFTAlgorithmConfig
from nemo_rlhf.types import Prompt, Sample, Scored
from tests.conftest import Tiny
from tests.jobs import metrics_of, rollouts_of
from tests.spawn import run_distributed
from tests.workers.rewards import count_a

QUIET = "trainer.enable_progress_bar=false"
CUTS = {
    "tp2": ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
    "pp2": ("model.pipeline_model_parallel_size=2",),
    "dp2": (),
}


# ---- which samples


@pytest.mark.parametrize(
    ("passes", "expected"), [(1, [0.9]), (2, [0.5, 0.9]), (3, [0.5, 0.7, 0.9]), (5, [0.5, 0.6, 0.7, 0.8, 0.9])]
)
def test_the_last_percentile_is_reached(passes: int, expected: list[float]) -> None:
    config = RFTAlgorithmConfig(improve_steps=passes, start_percentile=0.5, end_percentile=0.9)
    assert percentiles(config) == pytest.approx(expected)
    assert percentiles(config)[-1] == 0.9


def samples_of(*responses: tuple[int, ...], prompt: int = 0) -> list[Sample]:
    return [Sample(Prompt((prompt,), ""), index, ids, "", "eos") for index, ids in enumerate(responses)]


def test_every_prompt_keeps_its_best() -> None:
    responses = [(index,) for index in range(4)]
    samples = samples_of(*responses) + samples_of(*responses, prompt=1)
    rewards = torch.tensor([1.0, 4.0, 2.0, 3.0, 30.0, 10.0, 20.0, 40.0])
    assert best_rows(samples, rewards, 4, 0.5) == [1, 2, 3, 4, 6, 7]
    assert best_rows(samples, rewards, 4, 0.7) == [1, 3, 4, 7]
    assert best_rows(samples, rewards, 4, 1.0) == [1, 7]
    assert best_rows(samples, rewards, 4, 0.0) == [1, 2, 3, 4, 5, 6, 7], "the lowest of the round teaches nothing"


def test_rewards_of_few_values_keep_the_higher_ones() -> None:
    samples = samples_of((1,), (2,), (3,), (4,)) + samples_of((1,), (2,), (3,), (4,), prompt=1)
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert best_rows(samples, rewards, 4, 0.5) == [3]
    assert best_rows(samples, torch.zeros(8), 4, 0.5) == []


def test_the_same_response_counts_once() -> None:
    samples = samples_of((5, 1), (5, 1), (6, 1), (5,)) + samples_of((5, 1), (0,), (2,), (3,), prompt=1)
    rewards = torch.tensor([2.0, 2.0, 2.0, 1.0, 2.0, 0.0, 1.0, 2.0])
    assert best_rows(samples, rewards, 4, 0.5) == [0, 2, 4, 6, 7]


# ---- whole runs


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rft")
    assert main(tiny.rft(root / "tp1", QUIET)) == 0
    assert main(tiny.rft(root / "micro4", QUIET, "model.micro_batch_size=4")) == 0
    payload: list[dict[str, Any]] = [{"arguments": tiny.rft(root / name, *cut)} for name, cut in CUTS.items()]
    arguments = tiny.rft(root / "dp2_resumed")
    payload += [{"arguments": arguments, "stop_in_step": 2}, {"arguments": arguments}]
    for rank in run_distributed("tests.workers.run_worker:runs", 2, payload):
        assert [one["code"] for one in rank] == [0, 0, 0, 75, 0], rank
    return root


def assert_same_run(actual: Path, expected: Path) -> None:
    assert rollouts_of(actual) == rollouts_of(expected)
    for one, other in zip(metrics_of(actual), metrics_of(expected), strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["micro4", *CUTS])
def test_every_cut_gives_the_same_run(runs: Path, name: str) -> None:
    assert_same_run(runs / name, runs / "tp1")


def test_an_interrupted_run_goes_on_bit_equal(runs: Path) -> None:
    assert metrics_of(runs / "dp2_resumed") == metrics_of(runs / "dp2")
    assert rollouts_of(runs / "dp2_resumed") == rollouts_of(runs / "dp2")


def test_the_learning_rate_ends_with_the_run(runs: Path) -> None:
    rates = [row["lr"] for row in metrics_of(runs / "tp1") if "lr" in row]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01 * 3e-3


def test_learns_what_transformers_says_of_the_kept_samples(tiny: Tiny, tmp_path: Path) -> None:
    """With a learning rate of nothing, the loss of a round is that of its start on the samples of each pass."""
    from transformers import LlamaForCausalLM

    seen: list[Scored] = []

    def update(self: RFT, scored: Scored, step: int, original: Any = RFT.update) -> Any:
        seen.append(scored)
        return original(self, scored, step)

    overrides = ("model.optim.lr=1e-30", "model.optim.sched.name=constant", "trainer.max_steps=1", QUIET)
    with mock.patch.object(RFT, "update", update):
        assert main(tiny.rft(tmp_path / "run", *overrides)) == 0
    assert main(["convert", "export", str(tmp_path / "run" / "checkpoints" / "step_1"), str(tmp_path / "hf")]) == 0
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    samples, rewards = seen[0].rollout.samples, seen[0].scores.tolist()
    total, num_tokens, kept = 0.0, 0, []
    for percentile in (0.4, 0.65, 0.9):
        chosen = set()
        for first in range(0, 24, 6):
            threshold = sorted(rewards[first : first + 6])[int(percentile * 5)]
            chosen |= {
                (samples[row].prompt.token_ids, samples[row].response_ids)
                for row in range(first, first + 6)
                if rewards[row] >= threshold and rewards[row] > min(rewards)
            }
        kept.append(len(chosen) / 24)
        for prompt, response in chosen:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            total -= float(torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum())
            num_tokens += len(response)
    row = metrics_of(tmp_path / "run")[-1]
    assert row["loss"] == pytest.approx(total / num_tokens, rel=1e-5)
    assert (row["rft/kept_first"], row["rft/kept_last"]) == pytest.approx((kept[0], kept[-1]))
    assert kept[-1] < kept[0], "nothing rises, so nothing is tested"


def test_nothing_worth_keeping_leaves_the_model_as_it_is(tiny: Tiny, tmp_path: Path) -> None:
    arguments = tiny.rft(tmp_path / "run", "trainer.max_steps=1", "reward.function=tests.workers.rewards:constant")
    assert main([*arguments, QUIET]) == 0
    row = metrics_of(tmp_path / "run")[-1]
    assert (row["rft/updates"], row["loss"], row["rft/kept_first"]) == (0, 0, 0)


def test_the_reward_rises(tiny: Tiny, tmp_path: Path) -> None:
    """Through ``nemo_rlhf.train``, as Python programs do it."""
    overrides = [argument for argument in tiny.rft(tmp_path / "run")[1:] if "reward.function" not in argument]
    overrides = [argument for argument in overrides if not argument.startswith(("data.", "model.restore_from"))]
    overrides += ["trainer.max_steps=8", "rft.samples_per_prompt=16", "model.optim.lr=1e-2", QUIET]
    overrides += ["trainer.val_check_interval=0", "model.micro_batch_size=8", "generation.num_slots=64"]
    config = nemo_rlhf.config("rft", overrides=[*overrides, "model.optim.sched.name=constant"])  # type: ignore[operator]
    prompts = [json.loads(line) for line in tiny.prompts.read_text().splitlines()]
    result = nemo_rlhf.train(str(tiny.hf), reward_fn=count_a, prompts=prompts, config=config)
    rewards = [row["reward/mean"] for row in metrics_of(tmp_path / "run") if "reward/mean" in row]
    assert result.metrics["reward/mean"] == rewards[-1]
    assert rewards[0] < 0.5, "the start must leave something to learn"
    assert rewards[-1] > 2.0, rewards
