"""Per-token estimates of the KL divergence to the reference policy, and the controller of its coefficient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "abs"]
LOG_RATIO_LIMIT = 20.0
MAX_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(policy || reference) per token, estimated from tokens that the policy sampled. Same shape as the inputs.

    With ``d = logprobs - ref_logprobs``: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, low variance),
    k3 = exp(-d) - 1 + d (unbiased, never negative), abs = |d|. In k3 a d below -20 counts as -20, in both terms: the
    exponential does not overflow, and a token so far off has gradient 0, as in verl, NeMo-RL and OpenRLHF, and not
    that of the linear term alone, which points away from the reference.
    Source: J. Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d * d
    if estimator == "k3":
        d = d.clamp(min=-LOG_RATIO_LIMIT)
        return torch.expm1(-d) + d
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"ppo.kl.estimator is {estimator!r}: use one of k1, k2, k3, abs.")


def next_kl_coef(coef: float, kl: float, target: float | None, horizon: float, num_samples: int) -> float:
    """The KL coefficient of the next step: ``coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon)``.

    ``kl``: the mean over the samples of this step of what ``target`` speaks of, over all ranks; ``num_samples``: how
    many they were; ``horizon``: in samples. A target of None keeps the coefficient fixed.
    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """
    if target is None:
        return coef
    error = min(max(kl / target - 1.0, -MAX_ERROR), MAX_ERROR)
    return coef * (1.0 + error * num_samples / horizon)
