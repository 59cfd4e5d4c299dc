"""What each response token earns: the KL penalty, the score at the end, and dense rewards where they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def last_positions(mask: Tensor) -> Tensor:
    """Bool [batch, sequence], True at the last selected position of each row; an empty row has none."""
    selected_after = mask.flip(-1).cumsum(-1).flip(-1) - mask.long()
    return mask & (selected_after == 0)


def token_rewards(
    kl: Tensor, scores: Tensor, response_mask: Tensor, kl_coef: float, dense: Tensor | None = None
) -> Tensor:
    """Reward of every response token: [batch, sequence] fp32, zero outside ``response_mask``.

    ``-kl_coef * kl`` on each response token, plus ``scores`` [batch] on the last one (EOS if it was drawn), plus
    ``dense`` [batch, sequence] where given. ``kl`` and ``dense`` may hold anything outside the mask.
    """
    rewards = -kl_coef * kl.float()
    if dense is not None:
        rewards = rewards + dense.float()
    rewards = rewards + torch.where(last_positions(response_mask), scores.float().unsqueeze(-1), 0.0)
    return torch.where(response_mask, rewards, 0.0)
