"""How far annotators agree."""

from __future__ import annotations

from collections.abc import Iterable

import krippendorff
import numpy as np

from nemo_rlhf.feedback.records import VERDICTS, Vote


def alpha(votes: Iterable[Vote]) -> float | None:
    """Krippendorff's alpha of the verdicts, as names (Krippendorff, Content Analysis, 2004): 1 is agreement, 0 what
    chance gives. None where it does not exist: no task has two answers, or all such answers are the same."""
    counts: dict[int, list[int]] = {}
    for vote in votes:
        counts.setdefault(vote.task_id, [0] * len(VERDICTS))[VERDICTS.index(vote.verdict)] += 1
    shared = np.array([row for row in counts.values() if sum(row) > 1])
    if shared.size == 0 or np.count_nonzero(shared.sum(axis=0)) < 2:
        return None
    return float(krippendorff.alpha(value_counts=shared, level_of_measurement="nominal"))
