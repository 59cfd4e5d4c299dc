"""Scaling of scores before they become rewards, and the statistics that it carries from step to step.

Scaling divides by a standard deviation and does not subtract the mean (trlX's ``scale_reward: running | ref`` does the
same): a shift of every score would change what a longer response is worth under the KL penalty, a scale does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

RewardScaling = Literal["none", "running", "reference"]


@dataclass(frozen=True)
class ScoreStatistics:
    """Count, mean and sum of squared deviations of the scores seen so far."""

    count: float = 0.0
    mean: float = 0.0
    squared_deviations: float = 0.0

    @property
    def std(self) -> float:
        """Sample standard deviation (divided by count - 1); 0 for fewer than two scores."""
        return math.sqrt(self.squared_deviations / (self.count - 1)) if self.count > 1 else 0.0

    def merge(self, moments: Tensor) -> ScoreStatistics:
        """These statistics with those of more scores, given as their ``moments`` [3] summed over all ranks.

        Source: Chan, Golub and LeVeque 1983, "Algorithms for Computing the Sample Variance" (pairwise update).
        """
        count, total, squares = moments.double().tolist()
        if count == 0:
            return self
        mean = total / count
        squared_deviations = max(squares - count * mean * mean, 0.0)
        merged = self.count + count
        delta = mean - self.mean
        return ScoreStatistics(
            count=merged,
            mean=self.mean + delta * count / merged,
            squared_deviations=self.squared_deviations + squared_deviations + delta**2 * self.count * count / merged,
        )

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, float]) -> ScoreStatistics:
        return cls(**data)


def update_statistics(state: ScoreStatistics, moments: Tensor, mode: RewardScaling) -> ScoreStatistics:
    """The statistics that scale the scores of this step, this step's included.

    ``moments`` [3]: those of this step's scores, summed over data-parallel ranks; where rewards are dense, of their
    totals per sample. running: all scores so far. reference: those of the first step, kept from then on (of the first
    step whose scores differ at all, as a standard deviation of 0 scales nothing). none: ``state`` unchanged.
    """
    if mode == "running" or (mode == "reference" and state.std == 0.0):
        return state.merge(moments)
    return state


def scale_scores(scores: Tensor, state: ScoreStatistics, mode: RewardScaling, clip: float | None) -> Tensor:
    """``scores`` (any shape, dense rewards too) divided by ``state.std`` unless ``mode`` is none, then clipped.

    ``clip``: the result is limited to +-clip; None does not clip. As long as all scores are equal the standard
    deviation is 0 and they are not scaled.
    """
    scores = scores.float()
    if mode != "none" and state.std > 0.0:
        scores = scores / state.std
    return scores if clip is None else torch.clamp(scores, -clip, clip)
