"""Sums and moments over the selected positions of a tensor.

Moments are kept as (count, sum, sum of squares) because those add up: the sum of the moments of every data-parallel
rank is the moments of the whole batch, so a mean or a variance never depends on how the batch was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of ``x`` where ``mask`` (bool, same shape) is True, as a scalar; what lies elsewhere may be inf or NaN."""
    assert mask.dtype == torch.bool and mask.shape == x.shape, (mask.dtype, mask.shape, x.shape)
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask`` (bool, same shape) is True, as a scalar; 0 where nothing is selected."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def moments(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(count, sum, sum of squares) of the selected elements of ``x``: float64 [3], on the device of ``x``.

    ``mask``: bool, same shape; None selects everything. Add the results of several ranks for the moments of them all.
    """
    x = x.detach().double()
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    return torch.stack([mask.sum().double(), masked_sum(x, mask), masked_sum(x * x, mask)])


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance (float64 scalars) from ``moments`` [3]; both are 0 where the count is 0."""
    count, total, squares = moments.double().unbind()
    count = count.clamp(min=1)
    mean = total / count
    return mean, (squares / count - mean * mean).clamp(min=0)


def whiten(x: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """``(x - mean) / sqrt(variance + 1e-8)`` where ``mask`` is True and 0 elsewhere, in the dtype of ``x``.

    ``moments`` [3] are those of the whole rollout batch, over all data-parallel ranks; the variance is the
    population's.
    """
    mean, variance = mean_and_variance(moments)
    whitened = (x.double() - mean) * torch.rsqrt(variance + WHITEN_EPS)
    return torch.where(mask, whitened, 0.0).to(x.dtype)
