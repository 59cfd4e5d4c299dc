"""Opens the preference store for a PPO run: the run's own part of it, and what to do where it fails."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_rlhf.algorithms.people import Comparison, OutOfReach, PreferenceStore
from nemo_rlhf.config.schema import PPOConfig
from nemo_rlhf.feedback import require_libraries


def open_store(config: PPOConfig) -> PreferenceStore | None:
    """On rank 0, where the configuration names a store; elsewhere None.

    Raises:
        ValueError: the libraries are not installed, or there is no such store or file of guidelines.
    """
    feedback = config.ppo.feedback
    if feedback.store is None:
        return None
    require_libraries()
    if os.environ.get("RANK", "0") != "0":
        return None
    from nemo_rlhf.feedback.store import Store, run_name

    guidelines = None
    if feedback.guidelines is not None:
        path = Path(feedback.guidelines)
        if not path.is_file():
            raise ValueError(f"ppo.feedback.guidelines={path} is no file: write the guidelines, or leave it out.")
        guidelines = path.read_text()
    store = Store.open(feedback.store)
    run_id = store.run(
        feedback.run or run_name(config.exp_manager.explicit_log_dir),
        create=True,
        guidelines=guidelines,
        answers_wanted=feedback.answers_wanted,
        undo_s=feedback.undo_s,
    )
    return _RunStore(store, run_id)


class _RunStore:
    """A ``PreferenceStore``."""

    def __init__(self, store: Any, run_id: int) -> None:
        self._store, self._run = store, run_id

    def ask(self, step: int, questions: Sequence[dict[str, Any]]) -> int:
        from nemo_rlhf.feedback.records import NewTask

        with _reached():
            return self._store.add_tasks(self._run, step, [NewTask(**question) for question in questions])

    def settled(self) -> list[int]:
        with _reached():
            return self._store.settled_ids(self._run)

    def read(self, numbers: Sequence[int]) -> Sequence[Comparison]:
        with _reached():
            return self._store.comparisons(numbers)

    def report(self, **refresh: Any) -> None:
        from nemo_rlhf.feedback.records import Refresh

        with _reached():
            self._store.add_refresh(self._run, Refresh(**refresh))


@contextmanager
def _reached() -> Iterator[None]:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except SQLAlchemyError as error:
        raise OutOfReach(str(error).splitlines()[0]) from error
