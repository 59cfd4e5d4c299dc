"""What the ranks of tests/test_people.py do: whole runs whose annotators have always answered when the run looks."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

from tests.workers import run_worker


def early(prompt: str, answer: str) -> float:
    """What the annotators want: letters from the first half of the alphabet; of equals, the one that sorts first."""
    return sum(letter in "abcdefghijklm" for letter in answer) - sum(map(ord, answer)) / 10_000


def runs_and_what_a_store_refuses(payload: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``runs``, and what each rank hears of a call that rank 0 alone makes, and which fails there."""
    from nemo_rlhf.algorithms.preferences import SharedStore

    results = runs(payload)
    store: Any = object() if os.environ["RANK"] == "0" else None
    try:
        SharedStore(store).call(_refuse)
    except ValueError as error:
        return [*results, {"heard": f"ValueError: {error}"}]
    return [*results, {"heard": "nothing"}]


def _refuse(store: Any) -> None:
    raise ValueError(f"of rank {os.environ['RANK']}")


def runs(payload: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As ``run_worker.runs``, with the real store and scripted annotators who are wrong in one of ten."""
    from nemo_rlhf.cli import people
    from nemo_rlhf.config.feedback import SimulateConfig
    from nemo_rlhf.feedback.simulate import SimulatedAnnotators

    original = people._RunStore.settled

    def settled(self: Any) -> list[int]:
        annotators = SimulatedAnnotators(
            self._opened.store, self._opened.run_id, early, SimulateConfig(noise=0.1, annotators=2)
        )
        while annotators.answer_each():
            pass
        return original(self)

    with mock.patch.object(people._RunStore, "settled", settled):
        return run_worker.runs(payload)
