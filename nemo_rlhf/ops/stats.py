"""Figures for the log, from moments that were added up over all ranks, so that they are exact for the whole batch."""

from __future__ import annotations

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
