"""Advantages without a critic: what a response is worth beside the other responses to the same prompt."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP_EPS = 1e-6


@torch.no_grad()
def leave_one_out(returns: Tensor, group_size: int) -> Tensor:
    """``returns[i]`` minus the mean of the others of its group: [samples] fp32.

    ``returns`` [samples]: responses to one prompt lie side by side, ``group_size`` (2 or more) of them.
    Source: Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human
    Feedback in LLMs" (RLOO).
    """
    groups = _groups(returns, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).flatten().float()


@torch.no_grad()
def group_relative(scores: Tensor, group_size: int, scale_by_std: bool) -> Tensor:
    """``(scores[i] - mean) / (std + 1e-6)`` with mean and sample deviation of its group: [samples] fp32.

    ``scores`` [samples] as in ``leave_one_out``. A group of equal scores teaches nothing: 0. Without ``scale_by_std``
    only the mean is subtracted, so that prompts which are nearly always or nearly never answered well do not weigh
    more than others.
    Sources: Shao et al. 2024, "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models"
    (GRPO); Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective" (without the deviation).
    """
    groups = _groups(scores, group_size)
    relative = groups - groups.mean(1, keepdim=True)
    if scale_by_std:
        relative = relative / (groups.std(1, keepdim=True) + GROUP_EPS)
    return relative.flatten().float()


def _groups(x: Tensor, group_size: int) -> Tensor:
    """[prompts, group_size] fp64, so that equal numbers differ from their mean by less than ``GROUP_EPS`` can see."""
    assert x.dim() == 1 and group_size > 1 and x.numel() % group_size == 0, (x.shape, group_size)
    return x.double().view(-1, group_size)
