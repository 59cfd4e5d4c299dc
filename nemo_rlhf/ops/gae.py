"""Generalised advantage estimation over the tokens that the policy drew."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [batch, sequence] fp32 and zero where ``mask`` (bool) is False.

    With t counting a row's selected tokens, ``delta[t] = rewards[t] + gamma * values[t+1] - values[t]`` and the value
    after the last one 0: ``advantages[t] = sum over l of (gamma * lam)^l * delta[t+l]`` and
    ``returns = advantages + values``. What lies between two selected tokens (an environment's words) belongs to the
    next state; ``rewards`` and ``values`` may hold anything there.
    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation".
    """
    assert mask.dtype == torch.bool and rewards.shape == values.shape == mask.shape
    advantages = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    columns = mask.any(0).nonzero()
    if columns.numel() == 0:
        return advantages, advantages.clone()
    start, end = int(columns[0]), int(columns[-1]) + 1
    # Time first, so that each step of the loop reads one contiguous row.
    kept = mask[:, start:end].t().contiguous()
    reward = torch.where(kept, rewards[:, start:end].t().float(), 0.0)
    value = torch.where(kept, values[:, start:end].t().float(), 0.0)
    result = torch.empty_like(value)
    next_value = next_advantage = torch.zeros_like(value[0])
    for t in range(end - start - 1, -1, -1):
        delta = reward[t] + gamma * next_value - value[t]
        # Both are zero after a row's last token, which is what makes the terminal value 0, and pass over gaps.
        next_advantage = torch.where(kept[t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(kept[t], value[t], next_value)
        result[t] = next_advantage
    advantages[:, start:end] = torch.where(kept, result, 0.0).t()
    returns = torch.where(mask, advantages + values.float(), 0.0)
    return advantages, returns
