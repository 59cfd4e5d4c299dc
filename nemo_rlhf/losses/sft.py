"""Supervised fine-tuning: the cross-entropy of the learned tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def sft_loss(logprobs: Tensor, mask: Tensor, *, normalizer: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood summed over the selected tokens, divided by ``normalizer``.

    ``logprobs``: of the tokens themselves, any shape; ``mask``: bool, same shape, what lies outside it is ignored and
    gets no gradient; ``normalizer``: number of selected tokens over all microbatches and ranks.
    Metrics are sums over this microbatch's selected tokens (fp64 scalars): "loss" (of the token losses).
    """
    assert mask.dtype == torch.bool and mask.shape == logprobs.shape, (mask.dtype, mask.shape, logprobs.shape)
    losses = torch.where(mask, -logprobs, 0.0)
    losses = losses if losses.dtype == torch.float64 else losses.float()
    return losses.sum() / normalizer, {"loss": losses.detach().sum(dtype=torch.float64)}
