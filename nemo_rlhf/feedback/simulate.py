"""Scripted annotators for tests and dry runs. They answer as people do, at a desk, and are marked as simulated."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from typing import Any

from nemo_rlhf.config.feedback import SimulateConfig
from nemo_rlhf.feedback.accounts import without_access
from nemo_rlhf.feedback.desk import Desk
from nemo_rlhf.feedback.records import Lease, TooLate
from nemo_rlhf.feedback.store import Store

Prefer = Callable[[str, str], Any]  # prompt and answer to a score


class SimulatedAnnotators:
    """Annotators "simulated-1", "simulated-2", ... of a run, who prefer the answer with the higher score, or neither
    where scores are equal. With the chance ``noise`` one prefers the other answer (of equals, any). What an annotator
    says of a task depends on the seed and the task's key, not on who else is at work."""

    def __init__(self, store: Store, run_id: int, prefer: Prefer, config: SimulateConfig) -> None:
        self._prefer = prefer
        self._config = config
        names = [f"simulated-{number}" for number in range(1, config.annotators + 1)]
        self._desks = {name: Desk(store, run_id, without_access(store, run_id, name, simulated=True)) for name in names}

    def answer_each(self) -> int:
        """Each annotator answers one task, if there is one; returns how many did.

        Raises:
            ValueError: the function gave no finite number.
        """
        return sum(self._answer(name, desk) for name, desk in self._desks.items())

    def _answer(self, name: str, desk: Desk) -> bool:
        lease = desk.next()
        if lease is None:
            return False
        try:
            desk.answer(lease.token, self._choice(name, lease), 0.0)
        except TooLate:  # the function took longer than the lease
            return False
        return True

    def _choice(self, name: str, lease: Lease) -> str:
        left, right = (self._score(lease.prompt, answer) for answer in lease.answers)
        digest = hashlib.sha256(f"{self._config.seed}\n{name}\n{lease.key}".encode()).digest()
        chance = random.Random(digest)
        errs, coin = chance.random() < self._config.noise, chance.random()
        if left == right:
            return "tie" if not errs else ("left" if (coin < 0.5) != lease.swapped else "right")
        return "left" if (left > right) != errs else "right"

    def _score(self, prompt: str, answer: str) -> float:
        value = self._prefer(prompt, answer)
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"The function that prefers gave {str(value)[:60]!r} for {answer[:60]!r}, and no number.")
        return score
