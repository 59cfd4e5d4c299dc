"""The two losses of PPO: the clipped surrogate of the policy and the clipped regression of the critic.

Both take tensors of any one shape ([batch, sequence], or [tokens] already selected) and a bool mask of that shape. What
lies outside the mask is replaced before anything is computed with it, so it may be inf or NaN and gets no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rlhf.ops.kl import kl_estimate

LOG_RATIO_LIMIT = 20.0


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    normalizer: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over selected tokens of ``-min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)``, over ``normalizer``.

    ``rho = exp(clamp(logprobs - old_logprobs, -20, 20))``. With ``dual_clip`` c > 1, where A < 0 the objective is
    ``max(min(...), c * A)``. ``entropy`` (per token) is subtracted with weight ``entropy_coef``. Where ``ref_logprobs``
    is given, the k3 estimate of KL(policy || reference) is added with weight ``kl_coef``: GRPO's penalty, with a
    gradient of its own instead of a place in the rewards. ``normalizer``: number of selected tokens over all
    microbatches and ranks.

    Metrics are detached fp64 scalars, sums over this microbatch's selected tokens, to be added over microbatches and
    ranks and divided by the number of tokens: "loss/policy" (the surrogate alone), "ratio/mean", "clipfrac/policy"
    (tokens whose gradient the clip or the dual clip takes away), "approx_kl" (k3 of the old policy against the new
    one), "entropy/mean" where ``entropy`` is given, and "loss/kl" (k3, unweighted) where ``ref_logprobs`` is. One is no
    sum: "ratio/max_deviation", the largest |rho - 1|, which is **reduced by max**.
    Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"; Ye et al. 2020, "Mastering Complex
    Control in MOBA Games with Deep Reinforcement Learning" (dual clip); Shao et al. 2024, "DeepSeekMath: Pushing the
    Limits of Mathematical Reasoning in Open Language Models" (KL in the loss).
    """
    assert entropy is not None or entropy_coef == 0.0, "an entropy bonus needs the entropy"
    log_ratio = (_select(logprobs, mask) - _select(old_logprobs, mask)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantages = _select(advantages, mask)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    is_clipped = clipped < unclipped
    if dual_clip is not None:
        floor = dual_clip * advantages
        is_floored = (advantages < 0) & (objective < floor)
        objective = torch.where(is_floored, floor, objective)
        is_clipped = is_clipped | is_floored
    total = -objective.sum()
    metrics = {
        "loss/policy": _total(-objective),
        "ratio/mean": _total(torch.where(mask, ratio, 0.0)),
        "clipfrac/policy": _total(is_clipped),
        "approx_kl": _total(torch.expm1(log_ratio) - log_ratio),
        "ratio/max_deviation": _largest(ratio - 1.0),
    }
    if entropy is not None:
        entropy = _select(entropy, mask)
        metrics["entropy/mean"] = _total(entropy)
        if entropy_coef != 0.0:
            total = total - entropy_coef * entropy.sum()
    if ref_logprobs is not None:
        kl = kl_estimate(_select(logprobs, mask), _select(ref_logprobs, mask), "k3")
        metrics["loss/kl"] = _total(kl)
        if kl_coef != 0.0:
            total = total + kl_coef * kl.sum()
    return total / normalizer, metrics


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip: float | None,
    normalizer: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over selected tokens of ``0.5 * max((V - R)^2, (V_clip - R)^2)``, divided by ``normalizer``.

    ``V_clip = V_old + clip(V - V_old, -eps, eps)`` with eps the ``value_clip``; None is the plain squared
    error. Metrics as in ``policy_loss``: "loss/value" and "clipfrac/value" (tokens where the clipped term is the
    larger one, so that they get no gradient).
    """
    values, old_values, returns = (_select(x, mask) for x in (values, old_values, returns))
    losses = 0.5 * (values - returns) ** 2
    is_clipped = torch.zeros_like(mask)
    if value_clip is not None:
        # Clamping to the interval leaves a value inside it bit for bit as it is, so that it never counts as clipped.
        limited = torch.clamp(values, old_values - value_clip, old_values + value_clip)
        clipped_losses = 0.5 * (limited - returns) ** 2
        is_clipped = clipped_losses > losses
        losses = torch.maximum(losses, clipped_losses)
    return losses.sum() / normalizer, {"loss/value": _total(losses), "clipfrac/value": _total(is_clipped)}


def _select(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` in at least fp32, zero (and without gradient) outside ``mask``."""
    assert mask.dtype == torch.bool and mask.shape == x.shape, (mask.dtype, mask.shape, x.shape)
    x = torch.where(mask, x, 0.0)
    return x if x.dtype == torch.float64 else x.float()


def _total(x: Tensor) -> Tensor:
    return x.detach().sum(dtype=torch.float64)


def _largest(x: Tensor) -> Tensor:
    x = x.detach().abs().double()
    return x.max() if x.numel() else x.sum()
