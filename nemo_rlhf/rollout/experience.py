"""Scores to experience: rewards per token, advantages and returns, and the figures that describe them.

Works on the whole rollout batch, which every rank holds on the host, so nothing here depends on how ranks share work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nemo_rlhf.config.schema import PPOAlgorithmConfig
from nemo_rlhf.ops.advantages import group_relative, leave_one_out
from nemo_rlhf.ops.gae import gae
from nemo_rlhf.ops.kl import kl_estimate
from nemo_rlhf.ops.masks import masked_mean, moments, whiten
from nemo_rlhf.ops.rewards import token_rewards
from nemo_rlhf.ops.scaling import ScoreStatistics, scale_scores, update_statistics
from nemo_rlhf.ops.stats import explained_variance, mean_and_std
from nemo_rlhf.types import Experience, Sample, Scored


@dataclass(frozen=True)
class Evaluation:
    """What the models say of a rollout's tokens, [samples, sequence] fp32 each, before anything is learned from it.
    ``values``: None without a critic."""

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None


def build_experience(
    scored: Scored,
    batch: tuple[Tensor, Tensor, Tensor],
    evaluation: Evaluation,
    config: PPOAlgorithmConfig,
    kl_coef: float,
    statistics: ScoreStatistics,
) -> tuple[Experience, ScoreStatistics, dict[str, float]]:
    """Rewards, advantages and returns of a whole rollout batch.

    Args:
        batch: tokens [samples, sequence], mask of the response tokens, lengths [samples].
        kl_coef: the current coefficient of the KL penalty.
        statistics: of the scores so far, for ``ppo.reward_scaling``.

    Returns:
        The experience, the statistics with this batch's scores, and metrics by name.
    """
    tokens, mask, lengths = batch
    truncated = torch.tensor([sample.finish_reason == "length" for sample in scored.rollout.samples])
    dense = _dense(scored, mask)
    totals = scored.scores if dense is None else scored.scores + torch.where(mask, dense, 0.0).sum(-1)
    penalties = torch.zeros_like(totals)
    if config.on_truncation == "penalise":
        penalties[truncated] = config.truncation_penalty
    statistics = update_statistics(statistics, moments(totals - penalties), config.reward_scaling)  # type: ignore[arg-type]

    def scaled(scores: Tensor) -> Tensor:
        return scale_scores(scores, statistics, config.reward_scaling, config.reward_clip)  # type: ignore[arg-type]

    kl = kl_estimate(evaluation.logprobs, evaluation.ref_logprobs, config.kl.estimator)  # type: ignore[arg-type]
    rewards = token_rewards(
        kl,
        scaled(scored.scores - penalties),
        mask,
        kl_coef if config.advantage != "grpo" else 0.0,  # GRPO has it in the loss
        None if dense is None else scaled(dense),
    )
    raw_advantages, returns = _advantages(rewards, evaluation.values, mask, config)
    loss_mask = mask & ~truncated.unsqueeze(-1) if config.on_truncation == "mask" else mask
    advantages = torch.where(loss_mask, raw_advantages, 0.0)
    if config.whiten_advantages if config.whiten_advantages is not None else config.advantage == "gae":
        advantages = whiten(advantages, loss_mask, moments(advantages, loss_mask))
    experience = Experience(
        tokens=tokens,
        response_mask=mask,
        loss_mask=loss_mask,
        lengths=lengths,
        logprobs=evaluation.logprobs,
        ref_logprobs=evaluation.ref_logprobs,
        advantages=advantages,
        values=evaluation.values,
        returns=returns,
    )
    reward_mean, reward_std = mean_and_std(moments(totals))
    metrics = {
        "reward/mean": reward_mean,
        "reward/std": reward_std,
        "kl/mean": float(masked_mean(kl, mask)),
        "kl/sequence": float(torch.where(mask, kl, 0.0).sum(-1).mean()),
        "kl/coef": kl_coef,
        "entropy/mean": float(masked_mean(evaluation.entropy, mask)),
        "advantages/std": mean_and_std(moments(raw_advantages, loss_mask))[1],
        **_describe_values(experience),
        **_describe_responses(scored),
    }
    return experience, statistics, metrics


def describe_samples(experience: Experience, estimator: str) -> dict[str, Tensor]:
    """Of every sample [samples]: "kl", the sum of the estimate over its tokens, and "advantage", the mean over them of
    what the policy learned from; 0 where ``ppo.on_truncation`` left it out."""
    mask = experience.response_mask
    kl = kl_estimate(experience.logprobs, experience.ref_logprobs, estimator)  # type: ignore[arg-type]
    return {
        "kl": torch.where(mask, kl, 0.0).sum(-1),
        "advantage": experience.advantages.sum(-1) / mask.sum(-1).clamp(min=1),
    }


def _advantages(
    rewards: Tensor, values: Tensor | None, mask: Tensor, config: PPOAlgorithmConfig
) -> tuple[Tensor, Tensor | None]:
    """Advantages [samples, sequence] before whitening, and the returns that a critic learns, where there is one."""
    if config.advantage == "gae":
        assert values is not None
        return gae(rewards, values, mask, config.gamma, config.lam)
    totals = rewards.double().sum(-1)
    if config.advantage == "rloo":
        of_sample = leave_one_out(totals, config.samples_per_prompt)
    else:
        of_sample = group_relative(totals, config.samples_per_prompt, config.scale_by_std)
    return torch.where(mask, of_sample.unsqueeze(-1), 0.0), None


def _describe_values(experience: Experience) -> dict[str, float]:
    values, returns, mask = experience.values, experience.returns, experience.loss_mask
    if values is None or returns is None:
        return {}
    return {
        "value/mean": float(masked_mean(values, mask)),
        "value/explained_variance": explained_variance(moments(returns - values, mask), moments(returns, mask)),
        "returns/mean": float(masked_mean(returns, mask)),
    }


def _describe_responses(scored: Scored) -> dict[str, float]:
    samples = scored.rollout.samples
    return {
        **describe_turns(samples),
        "response_length/mean": sum(sample.num_sampled for sample in samples) / len(samples),
        "eos/share": sum(sample.finish_reason.startswith("eos") for sample in samples) / len(samples),
        "truncated/share": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
    }


def describe_turns(samples: Sequence[Sample]) -> dict[str, float]:
    """``turns/mean``, of the policy, where the samples are episodes."""
    masks = [(False, *sample.action_mask) for sample in samples if sample.action_mask is not None]
    turns = sum(here and not before for mask in masks for before, here in pairwise(mask))
    return {"turns/mean": turns / len(masks)} if masks else {}


def _dense(scored: Scored, mask: Tensor) -> Tensor | None:
    """Rewards per token in their places [samples, sequence]."""
    if scored.token_rewards is None:
        return None
    dense = torch.zeros(mask.shape, dtype=torch.float32)
    dense[mask] = torch.cat(list(scored.token_rewards))
    return dense
