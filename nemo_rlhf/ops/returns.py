"""Monte-Carlo returns over the actions of dialogues."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """``G[t] = rewards[t] + gamma * G[next action]``, [batch, sequence] fp32 and zero where ``mask`` (bool) is False.

    A row's actions need not be contiguous: what lies between two of them takes no time.
    """
    assert mask.dtype == torch.bool and rewards.shape == mask.shape
    returns = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    following = torch.zeros(mask.size(0), dtype=torch.float32, device=mask.device)
    for t in range(mask.size(1) - 1, -1, -1):
        following = torch.where(mask[:, t], rewards[:, t].float() + gamma * following, following)
        returns[:, t] = torch.where(mask[:, t], following, 0.0)
    return returns
