"""Advantages without a critic (RLOO, GRPO), and truncated responses: numbers by hand, and whole runs."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rlhf.config import load
from nemo_rlhf.config.schema import PPOAlgorithmConfig
from nemo_rlhf.data.batches import pad_samples
from nemo_rlhf.losses.ppo import policy_loss
from nemo_rlhf.ops.advantages import group_relative, leave_one_out
from nemo_rlhf.ops.masks import mean_and_variance, moments
from nemo_rlhf.ops.scaling import ScoreStatistics
from nemo_rlhf.rollout.experience import Evaluation, build_experience, describe_samples
from nemo_rlhf.types import Experience, FinishReason, Prompt, Rollout, Sample, Scored
from tests.conftest import Tiny
from tests.jobs import assert_same_rollouts, error_lines, metrics_of, rollouts_of
from tests.spawn import run_distributed

# ---- the maths


def test_leave_one_out_by_hand() -> None:
    returns = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert leave_one_out(returns, 3).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0]
    assert leave_one_out(torch.tensor([1.0, 4.0]), 2).tolist() == [-3, 3]


def test_group_relative_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    deviation = math.sqrt((4 + 1 + 9) / 2) + 1e-6
    expected = [-2 / deviation, -1 / deviation, 3 / deviation, 0, 0, 0]
    assert group_relative(scores, 3, True).tolist() == pytest.approx(expected, rel=1e-7)
    assert group_relative(scores, 3, False).tolist() == [-2, -1, 3, 0, 0, 0]


@pytest.mark.parametrize("size", [3, 7])
def test_equal_scores_teach_nothing(size: int) -> None:
    """Their mean is off by rounding, which a deviation near zero must not blow up."""
    scores = torch.full((2 * size,), 0.1)
    assert group_relative(scores, size, True).abs().max() < 1e-8
    assert leave_one_out(scores, size).abs().max() < 1e-8


def test_kl_in_the_loss_by_token() -> None:
    """Value and gradient against the definition, with garbage outside the mask."""
    draw = torch.Generator().manual_seed(3)
    new, old, ref, advantages = (torch.randn(3, 5, generator=draw, dtype=torch.float64) * 0.3 for _ in range(4))
    mask = torch.rand(3, 5, generator=draw) < 0.7
    ref[~mask] = float("nan")
    new.requires_grad_()
    arguments = {"clip_low": 0.2, "clip_high": 0.2, "normalizer": 4.0}
    plain, _ = policy_loss(new, old, advantages, mask, **arguments)
    (plain_gradient,) = torch.autograd.grad(plain, new)
    loss, metrics = policy_loss(new, old, advantages, mask, ref_logprobs=ref, kl_coef=0.5, **arguments)
    (gradient,) = torch.autograd.grad(loss, new)
    total, now = 0.0, new.detach()
    for row, column in mask.nonzero().tolist():
        ratio = math.exp(float(ref[row, column] - now[row, column]))
        total += ratio - math.log(ratio) - 1
        # d/d new of ref/new - log(ref/new) - 1, as of probabilities
        assert float(gradient[row, column] - plain_gradient[row, column]) == pytest.approx(0.5 * (1 - ratio) / 4)
    assert float((loss - plain).detach()) == pytest.approx(0.5 * total / 4)
    assert float(metrics["loss/kl"]) == pytest.approx(total)
    assert (gradient[~mask] == 0).all()
    watched, metrics = policy_loss(new, old, advantages, mask, ref_logprobs=ref, **arguments)
    assert float(watched.detach()) == float(plain.detach()) and float(metrics["loss/kl"]) == pytest.approx(total)


# ---- experience

LENGTHS = (3, 1, 4, 2)
SCORES = (1.0, 3.0, -2.0, 0.5)
ENDS: tuple[FinishReason, ...] = ("eos", "length", "stop:.", "length")


def scored(ends: tuple[FinishReason, ...] = ENDS, dense: bool = False) -> Scored:
    samples = tuple(
        Sample(Prompt((7, 8), "p"), index, tuple(range(1, length + 1)), "r", end)
        for index, (length, end) in enumerate(zip(LENGTHS, ends, strict=True))
    )
    if not dense:
        return Scored(Rollout(samples), torch.tensor(SCORES))
    rewards = tuple(torch.tensor([score / length] * length) for score, length in zip(SCORES, LENGTHS, strict=True))
    return Scored(Rollout(samples), torch.zeros(4), rewards)


def experience(rollout: Scored, **keys: Any) -> tuple[Experience, dict[str, float]]:
    config = replace(PPOAlgorithmConfig(reward_clip=None, minibatch_size=2), **keys)
    batch = pad_samples(rollout.rollout.samples, 0)
    draw = torch.Generator().manual_seed(0)
    logprobs, reference, values = (torch.randn(batch[0].shape, generator=draw) for _ in range(3))
    if config.advantage != "gae":
        evaluation = Evaluation(logprobs, reference, entropy=torch.ones(batch[0].shape))
    else:
        evaluation = Evaluation(logprobs, reference, torch.ones(batch[0].shape), values)
    made, _, metrics = build_experience(rollout, batch, evaluation, config, 0.1, ScoreStatistics())
    return made, metrics


def rows(x: Tensor, mask: Tensor) -> list[list[float]]:
    assert (x[~mask] == 0).all()
    return [x[row][mask[row]].tolist() for row in range(len(x))]


@pytest.mark.parametrize("dense", [False, True])
def test_rloo_takes_the_penalty_from_the_return_of_a_response(dense: bool) -> None:
    made, metrics = experience(scored(dense=dense), advantage="rloo", samples_per_prompt=2)
    kl = made.logprobs - made.ref_logprobs
    returns = [
        s - 0.1 * float(kl[row, 2 : 2 + n].sum()) for row, (s, n) in enumerate(zip(SCORES, LENGTHS, strict=True))
    ]
    for row, advantages in enumerate(rows(made.advantages, made.response_mask)):
        other = returns[row ^ 1]
        assert advantages == pytest.approx([returns[row] - other] * LENGTHS[row], abs=1e-5)
    assert made.values is None and made.returns is None
    assert not [name for name in metrics if name.startswith(("value/", "returns/"))]


@pytest.mark.parametrize("by_std", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_grpo_takes_scores_alone(dense: bool, by_std: bool) -> None:
    made, _ = experience(scored(dense=dense), advantage="grpo", samples_per_prompt=4, scale_by_std=by_std)
    mean, deviation = sum(SCORES) / 4, statistics.stdev(SCORES) + 1e-6
    for row, advantages in enumerate(rows(made.advantages, made.response_mask)):
        expected = (SCORES[row] - mean) / (deviation if by_std else 1.0)
        assert advantages == pytest.approx([expected] * LENGTHS[row], abs=1e-6)


@pytest.mark.parametrize(("advantage", "asked", "whitened"), [
    ("gae", None, True), ("gae", False, False), ("rloo", None, False), ("grpo", None, False), ("rloo", True, True),
])  # fmt: skip
def test_whitening_is_for_gae_unless_asked_for(advantage: str, asked: bool | None, whitened: bool) -> None:
    made, _ = experience(scored(), advantage=advantage, whiten_advantages=asked)
    mean, variance = mean_and_variance(moments(made.advantages, made.loss_mask))
    assert ((abs(float(mean)) < 1e-6) and abs(float(variance) - 1) < 1e-4) == whitened


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_masked_responses_teach_nothing_and_do_not_whiten(advantage: str) -> None:
    made, metrics = experience(
        scored(), advantage=advantage, samples_per_prompt=4, on_truncation="mask", whiten_advantages=True
    )
    kept = [0, 2]
    assert made.loss_mask.any(1).tolist() == [True, False, True, False]
    assert torch.equal(made.loss_mask[kept], made.response_mask[kept])
    assert (made.advantages[[1, 3]] == 0).all()
    mean, variance = mean_and_variance(moments(made.advantages[kept], made.response_mask[kept]))
    assert (float(mean), float(variance)) == pytest.approx((0, 1), abs=1e-5)
    assert metrics["truncated/share"] == 0.5
    assert metrics["reward/mean"] == pytest.approx(sum(SCORES) / 4)
    assert describe_samples(made, "k1")["advantage"][[1, 3]].tolist() == [0, 0]


def test_masked_responses_still_count_in_the_baseline() -> None:
    made, _ = experience(scored(), advantage="grpo", on_truncation="mask", scale_by_std=False)
    assert [row[0] for row in rows(made.advantages, made.loss_mask) if row] == pytest.approx([-1.0, -1.25])


def test_a_batch_of_truncated_responses_is_finite() -> None:
    made, metrics = experience(scored(("length",) * 4), on_truncation="mask")
    assert not made.loss_mask.any() and (made.advantages == 0).all()
    assert all(math.isfinite(value) for value in metrics.values())


def test_penalised_responses_lose_a_constant() -> None:
    made, metrics = experience(
        scored(), advantage="grpo", on_truncation="penalise", truncation_penalty=1.5, scale_by_std=False
    )
    assert [row[0] for row in rows(made.advantages, made.response_mask)] == pytest.approx([-0.25, 0.25, -0.5, 0.5])
    assert metrics["reward/mean"] == pytest.approx(sum(SCORES) / 4), "what the reward function returned"


def test_a_samples_figures() -> None:
    made, _ = experience(scored(), advantage="gae")
    figures = describe_samples(made, "k1")
    for row, length in enumerate(LENGTHS):
        places = slice(2, 2 + length)
        kl = (made.logprobs - made.ref_logprobs)[row, places].sum()
        assert float(figures["kl"][row]) == pytest.approx(float(kl), abs=1e-6)
        assert float(figures["advantage"][row]) == pytest.approx(float(made.advantages[row, places].mean()), abs=1e-6)


# ---- configuration


@pytest.mark.parametrize(("overrides", "words"), [
    (("ppo.advantage=rloo", "ppo.samples_per_prompt=1"), r"ppo\.samples_per_prompt=1: raise it to 2 or more"),
    (("ppo.advantage=grpo", "model.critic.restore_from=/rm"), r"model\.critic\.restore_from=/rm is for a critic"),
    (("ppo.advantage=grpo", "ppo.critic_warmup_steps=2"), r"ppo\.critic_warmup_steps=2 is for a critic"),
    (("ppo.advantage=rloo", "ppo.gamma=0.9"), r"ppo\.gamma=0\.9 is for a critic"),
    (("ppo.advantage=rloo", "ppo.offload=[optimizer,critic]"), r"ppo\.offload holds critic, and ppo\.advantage=rloo"),
    (("ppo.on_truncation=mask", "generation.ignore_eos=true"), "cuts all of them: turn one of the two off"),
    (("ppo.advantage=reinforce",), "choose one of gae, rloo, grpo"),
    (("ppo.truncation_penalty=2",), "is for ppo.on_truncation=penalise, and it is keep"),
    (("ppo.scale_by_std=false",), "is for ppo.advantage=grpo, and it is gae"),
    (("ppo.on_truncation=drop",), "choose one of keep, mask, penalise"),
    (("ppo.truncation_penalty=-1",), "must be greater than 0"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(tiny: Tiny, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load("ppo", tiny.ppo(Path("run"), *overrides)[1:])


# ---- whole runs

WORKER = "tests.workers.run_worker:runs"
TP2 = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
PP2 = ("model.pipeline_model_parallel_size=2",)
ALL_CHANGES = "exp_manager.allow_changes=true"
NO_VALIDATION = "trainer.val_check_interval=0"
NO_CRITIC = (NO_VALIDATION, "ppo.samples_per_prompt=4", "ppo.num_prompts=4", "ppo.kl.coef=0.2")
GRPO = ("ppo.advantage=grpo", *NO_CRITIC)
RLOO = ("ppo.advantage=rloo", "ppo.on_truncation=mask", *NO_CRITIC)


@pytest.fixture(scope="module")
def place(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("advantages")

    def run(name: str, *overrides: str, **more: Any) -> dict[str, Any]:
        return {"arguments": tiny.ppo(root / name, *overrides), **more}

    short = ("generation.max_new_tokens=1", "trainer.max_steps=2")
    longer = ("trainer.max_steps=8", "ppo.num_prompts=8", "model.micro_batch_size=8")
    longer = (*longer, "model.optim.lr=1e-2", "ppo.kl.target=null", "ppo.kl.coef=0.01", "generation.num_slots=32")
    payload = [
        run("grpo", *GRPO, "ppo.show_samples_every=2"),
        run("rloo", *RLOO),
        run("rloo_resumed", *RLOO, stop_in_step=2),
        run("rloo_resumed", *RLOO),
        run("rloo_to_gae", ALL_CHANGES, copy=(str(root / "rloo_resumed"), str(root / "rloo_to_gae"))),
        run("cut_off", *RLOO, *short),
        run("cut_off_gae", "ppo.on_truncation=mask", NO_VALIDATION, *short),
        run("learns_grpo", *GRPO, *longer),
        run("learns_rloo", *NO_CRITIC, "ppo.advantage=rloo", "ppo.on_truncation=penalise", *longer),
    ]
    (one,) = run_distributed(WORKER, 1, payload, timeout_s=400)
    assert not [each["traceback"] for each in one if "traceback" in each]
    assert [each["code"] for each in one] == [0, 0, 75, 0, 2, 0, 0, 0, 0], [each["stderr"] for each in one]
    assert re.findall(r"samples of step \d+", one[0]["stderr"]) == ["samples of step 2"]
    (line,) = error_lines(one[4]["stderr"])
    assert "has no critic, which is needed with ppo.advantage=gae" in line
    cuts = [run("grpo_tp2", *GRPO, *TP2), run("rloo_pp2", *RLOO, *PP2), run("grpo_dp2", *GRPO)]
    for rank in run_distributed(WORKER, 2, cuts, timeout_s=400):
        assert [each["code"] for each in rank] == [0, 0, 0], rank
    return root


@pytest.mark.parametrize(("cut", "straight"), [("grpo_tp2", "grpo"), ("grpo_dp2", "grpo"), ("rloo_pp2", "rloo")])
def test_every_cut_learns_the_same(place: Path, cut: str, straight: str) -> None:
    for one, other in zip(metrics_of(place / cut), metrics_of(place / straight), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=5e-6)
    assert_same_rollouts(place / cut, place / straight)


def test_resuming_changes_no_bit(place: Path) -> None:
    assert metrics_of(place / "rloo_resumed") == metrics_of(place / "rloo")
    assert rollouts_of(place / "rloo_resumed") == rollouts_of(place / "rloo")


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_there_is_no_critic_anywhere(place: Path, name: str) -> None:
    (checkpoint,) = (path for path in (place / name / "checkpoints").iterdir() if path.is_dir())
    assert not list(checkpoint.rglob("*critic*")) and (checkpoint / "training" / "policy").is_dir()
    for row in metrics_of(place / name):
        assert not [key for key in row if "value" in key or "critic" in key or key == "returns/mean"]
        assert ("loss/kl" in row) == (name == "grpo")
        assert row["check/ratio_step0"] == pytest.approx(1, abs=1e-6)


def test_step_0_is_exact(place: Path) -> None:
    row = metrics_of(place / "grpo")[0]
    assert (row["check/ratio_step0"], row["check/kl_step0"], row["kl/mean"]) == (1.0, 0.0, 0.0)
    assert metrics_of(place / "grpo")[-1]["loss/kl"] > 0


@pytest.mark.parametrize("name", ["cut_off", "cut_off_gae"])
def test_a_step_of_truncated_responses_changes_nothing(place: Path, name: str) -> None:
    rows = metrics_of(place / name)
    first, last = (rollouts_of(place / name)[f"step_{step}"] for step in (1, 2))
    cut_off = [all(sample["finish_reason"] == "length" for sample in samples) for samples in (first, last)]
    assert cut_off == [row["truncated/share"] == 1 for row in rows]
    assert any(cut_off), "chance drew an EOS in both steps: choose another seed"
    for row, nothing in zip(rows, cut_off, strict=True):
        assert (row["grad_norm/policy"] == 0) == nothing
        assert all(math.isfinite(value) for value in row.values())


@pytest.mark.parametrize("name", ["learns_grpo", "learns_rloo"])
def test_the_reward_rises(place: Path, name: str) -> None:
    rewards = [row["reward/mean"] for row in metrics_of(place / name)]
    assert sum(rewards[:2]) / 2 < 0.5 and sum(rewards[-2:]) / 2 > 1.5, rewards


def test_rollouts_tell_of_every_sample(place: Path) -> None:
    lines = (place / "grpo" / "rollouts" / "step_2.jsonl").read_text().splitlines()
    assert len(lines) == 16
    for line in lines:
        record = json.loads(line)
        assert len(record["response_ids"]) == record["num_tokens"]
        assert {"prompt", "response", "score", "kl", "advantage", "finish_reason", "letter"} <= record.keys()
    groups = [[json.loads(line) for line in lines[first : first + 4]] for first in range(0, 16, 4)]
    for group in groups:
        assert len({record["prompt"] for record in group}) == 1
        assert sum(record["advantage"] for record in group) == pytest.approx(0, abs=1e-4)
