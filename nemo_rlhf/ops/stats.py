"""Figures for the log, from moments that were added up over all ranks, so that they are exact for the whole batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_rlhf.ops.masks import mean_and_variance


def mean_and_std(moments: Tensor) -> tuple[float, float]:
    """Mean and population standard deviation from ``moments`` [3]; both 0.0 where the count is 0."""
    mean, variance = mean_and_variance(moments)
    return mean.item(), variance.sqrt().item()


def explained_variance(residuals: Tensor, returns: Tensor) -> float:
    """``1 - Var(returns - values) / Var(returns)``: 1 for a perfect critic, 0 for one that says a constant.

    ``residuals``: ``moments(returns - values, mask)``; ``returns``: ``moments(returns, mask)``; both [3] and summed
    over data-parallel ranks. 0.0 where the returns do not vary, as there is nothing to explain.
    """
    _, residual_variance = mean_and_variance(residuals)
    _, return_variance = mean_and_variance(returns)
    if return_variance.item() == 0.0:
        return 0.0
    return 1.0 - (residual_variance / return_variance).item()


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two [N]; 0.0 where one of them does not vary."""
    x, y = (values.double() - values.double().mean() for values in (x, y))
    scale = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x * y).sum().item() / scale if scale else 0.0


def histograms(values: Mapping[str, Tensor], num_bins: int) -> tuple[list[float], dict[str, list[int]]]:
    """Edges (``num_bins`` + 1) that hold all finite values of every tensor, and how many of each lie between them."""
    finite = {name: value[value.isfinite()].double().cpu() for name, value in values.items()}
    everything = torch.cat([value.flatten() for value in finite.values()])
    low, high = (float(everything.min()), float(everything.max())) if everything.numel() else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = {name: torch.histc(value, num_bins, low, high).long().tolist() for name, value in finite.items()}
    return torch.linspace(low, high, num_bins + 1, dtype=torch.float64).tolist(), counts
