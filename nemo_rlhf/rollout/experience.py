"""Scores to experience: rewards per token, advantages and returns, and the figures that describe them.

Works on the whole rollout batch, which every rank holds on the host, so nothing here depends on how ranks share work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rlhf.config.schema import PPOAlgorithmConfig
from nemo_rlhf.ops.gae import gae
from nemo_rlhf.ops.kl import kl_estimate
from nemo_rlhf.ops.masks import masked_mean, moments, whiten
from nemo_rlhf.ops.rewards import token_rewards
from nemo_rlhf.ops.scaling import ScoreStatistics, scale_scores, update_statistics
from nemo_rlhf.ops.stats import explained_variance, mean_and_std
from nemo_rlhf.types import Experience, Scored


@dataclass(frozen=True)
class Evaluation:
    """What the models say of a rollout's tokens, [samples, sequence] fp32 each, before anything is learned from it."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    entropy: Tensor


def build_experience(
    scored: Scored,
    batch: tuple[Tensor, Tensor, Tensor],
    evaluation: Evaluation,
    config: PPOAlgorithmConfig,
    kl_coef: float,
    statistics: ScoreStatistics,
) -> tuple[Experience, ScoreStatistics, dict[str, float]]:
    """Rewards, generalised advantages and returns of a whole rollout batch.

    Args:
        batch: tokens [samples, sequence], mask of the response tokens, lengths [samples].
        kl_coef: the current coefficient of the KL penalty.
        statistics: of the scores so far, for ``ppo.reward_scaling``.

    Returns:
        The experience, the statistics with this batch's scores, and metrics by name.
    """
    tokens, mask, lengths = batch
    dense = _dense(scored, mask)
    totals = scored.scores if dense is None else scored.scores + torch.where(mask, dense, 0.0).sum(-1)
    statistics = update_statistics(statistics, moments(totals), config.reward_scaling)  # type: ignore[arg-type]

    def scaled(scores: Tensor) -> Tensor:
        return scale_scores(scores, statistics, config.reward_scaling, config.reward_clip)  # type: ignore[arg-type]

    kl = kl_estimate(evaluation.logprobs, evaluation.ref_logprobs, config.kl.estimator)  # type: ignore[arg-type]
    rewards = token_rewards(kl, scaled(scored.scores), mask, kl_coef, None if dense is None else scaled(dense))
    advantages, returns = gae(rewards, evaluation.values, mask, config.gamma, config.lam)
    raw_advantages = advantages
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, moments(advantages, mask))
    experience = Experience(
        tokens=tokens,
        response_mask=mask,
        lengths=lengths,
        logprobs=evaluation.logprobs,
        ref_logprobs=evaluation.ref_logprobs,
        values=evaluation.values,
        advantages=advantages,
        returns=returns,
    )
    reward_mean, reward_std = mean_and_std(moments(totals))
    samples = scored.rollout.samples
    metrics = {
        "reward/mean": reward_mean,
        "reward/std": reward_std,
        "kl/mean": float(masked_mean(kl, mask)),
        "kl/sequence": float(torch.where(mask, kl, 0.0).sum(-1).mean()),
        "kl/coef": kl_coef,
        "entropy/mean": float(masked_mean(evaluation.entropy, mask)),
        "value/mean": float(masked_mean(evaluation.values, mask)),
        "value/explained_variance": explained_variance(
            moments(returns - evaluation.values, mask), moments(returns, mask)
        ),
        "advantages/std": mean_and_std(moments(raw_advantages, mask))[1],
        "returns/mean": float(masked_mean(returns, mask)),
        "response_length/mean": sum(len(sample.response_ids) for sample in samples) / len(samples),
        "eos/share": sum(sample.finish_reason == "eos" for sample in samples) / len(samples),
    }
    return experience, statistics, metrics


def _dense(scored: Scored, mask: Tensor) -> Tensor | None:
    """Rewards per token in their places [samples, sequence]."""
    if scored.token_rewards is None:
        return None
    dense = torch.zeros(mask.shape, dtype=torch.float32)
    dense[mask] = torch.cat(list(scored.token_rewards))
    return dense
