"""Losses of a reward model: of pairs that people compared, and of texts that they gave scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, normalizer: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-log sigmoid(chosen - rejected - margin)`` summed over pairs, divided by ``normalizer``.

    Args:
        chosen, rejected: [pairs] scores of the better and the worse response.
        margins: [pairs] by how much the better one should lead (Touvron et al. 2023, "Llama 2", section 3.2.2).
        normalizer: number of pairs over all microbatches and ranks.

    Metrics are detached fp64 scalars, sums over this microbatch's pairs: "loss", "accuracy" (pairs in the right order),
    "margin/mean" (chosen minus rejected), "score/mean" and "score/square" (of both; to be halved).
    Source: Bradley and Terry 1952; Christiano et al. 2017, "Deep reinforcement learning from human preferences".
    """
    lead = chosen - rejected
    losses = -F.logsigmoid(lead if margins is None else lead - margins)
    metrics = {
        "loss": losses,
        "accuracy": (lead > 0).double(),
        "margin/mean": lead,
        "score/mean": (chosen + rejected) / 2,
        "score/square": (chosen.square() + rejected.square()) / 2,
    }
    totals = {name: value.detach().sum(dtype=torch.float64) for name, value in metrics.items()}
    return losses.sum() / normalizer, totals


def regression_loss(
    predicted: Tensor, scores: Tensor, *, normalizer: float | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """``(predicted - score)^2`` summed over texts, divided by ``normalizer``.

    Args:
        predicted: [texts] what the model says.
        scores: [texts] what people say.
        normalizer: number of texts over all microbatches and ranks.

    Metrics are detached fp64 scalars, sums over this microbatch's texts: "loss", "mae" (absolute errors), "score/mean"
    and "score/square" (of the model's scores).
    Source: Wang et al. 2023, "HelpSteer", section 3 (one attribute).
    """
    errors = predicted - scores
    losses = errors.square()
    metrics = {"loss": losses, "mae": errors.abs(), "score/mean": predicted, "score/square": predicted.square()}
    totals = {name: value.detach().sum(dtype=torch.float64) for name, value in metrics.items()}
    return losses.sum() / normalizer, totals
