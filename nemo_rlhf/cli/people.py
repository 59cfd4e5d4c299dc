"""Opens the preference store for a PPO run: the run's own part of it, and what to do where it fails."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rlhf.algorithms.preferences import Comparison, OutOfReach, PreferenceStore
from nemo_rlhf.cli.callbacks import stored_checkpoints
from nemo_rlhf.config.schema import PPOConfig
from nemo_rlhf.feedback import require_libraries
from nemo_rlhf.feedback.records import NewTask, Refresh, check_task


def open_store(config: PPOConfig) -> PreferenceStore | None:
    """On rank 0, where the configuration names a store; elsewhere None. A run that goes on from a checkpoint does so
    without the store, where that does not answer, and tries again at each step.

    Raises:
        ValueError: the libraries are not installed, or there is no such store or file of guidelines.
    """
    feedback = config.ppo.feedback
    if feedback.store is None:
        return None
    require_libraries()
    if os.environ.get("RANK", "0") != "0":
        return None
    from nemo_rlhf.feedback.store import run_name

    guidelines = None
    if feedback.guidelines is not None:
        path = Path(feedback.guidelines)
        if not path.is_file():
            raise ValueError(f"ppo.feedback.guidelines={path} is no file: write the guidelines, or leave it out.")
        guidelines = path.read_text()
    run_dir = Path(config.exp_manager.explicit_log_dir)
    settings = {
        "guidelines": guidelines,
        "answers_wanted": feedback.answers_wanted,
        "undo_s": feedback.undo_s,
    }
    store = _RunStore(feedback.store, feedback.run or run_name(run_dir), settings)
    try:
        store.fingerprint()
    except OutOfReach as error:
        if not (config.exp_manager.resume_if_exists and stored_checkpoints(run_dir)):
            raise ValueError(str(error)) from error
    return store


@dataclass(frozen=True)
class _Opened:
    store: Any
    run_id: int


class _RunStore:
    """A ``PreferenceStore``, which is opened when it is first needed and answers."""

    def __init__(self, url: str, run: str, settings: dict[str, Any]) -> None:
        self._url, self._run, self._settings = url, run, settings
        self._opened: _Opened | None = None

    def ask(self, step: int, questions: Sequence[dict[str, Any]], most: int) -> int:
        tasks: list[NewTask] = []
        for question in questions:
            task = _as_task(**question)
            try:
                check_task(task)
            except ValueError as error:
                warnings.warn(f"{error} Nobody is asked about it.", stacklevel=2)
            else:
                tasks.append(task)
            if len(tasks) == most:
                break
        with self._reached() as its:
            return its.store.add_tasks(its.run_id, step, tasks)

    def fingerprint(self) -> str:
        with self._reached() as its:
            return f"{its.run_id}/{its.store.info(its.run_id).created_at!r}"

    def may_grow(self) -> bool:
        with self._reached() as its:
            return its.store.may_grow(its.run_id)

    def settled(self) -> list[int]:
        with self._reached() as its:
            return its.store.settled_ids(its.run_id)

    def read(self, numbers: Sequence[int]) -> Sequence[Comparison]:
        with self._reached() as its:
            found = its.store.comparisons(numbers)
        if missing := set(numbers) - {one.id for one in found}:
            raise ValueError(
                f"The preference store has lost comparison {min(missing)}, which nobody could take back any more."
            )
        return found

    def report(self, **refresh: Any) -> None:
        with self._reached() as its:
            its.store.add_refresh(its.run_id, Refresh(**refresh))

    @contextmanager
    def _reached(self) -> Iterator[_Opened]:
        from sqlalchemy.exc import SQLAlchemyError

        from nemo_rlhf.feedback.database import Unreachable

        try:
            self._opened = self._opened or self._open()
            yield self._opened
        except (SQLAlchemyError, Unreachable) as error:
            raise OutOfReach(str(error).splitlines()[0]) from error

    def _open(self) -> _Opened:
        from nemo_rlhf.feedback.store import Store

        store = Store.open(self._url)
        try:
            return _Opened(store, store.run(self._run, create=True, **self._settings))
        except BaseException:
            store.close()
            raise


def _as_task(
    key: str,
    prompt: str,
    messages: Sequence[dict[str, Any]] | None,
    answers: tuple[str, str],
    priority: float,
    metadata: dict[str, Any],
) -> NewTask:
    """Of a chat people read who says what; where that is more than text, they read the template's."""
    from nemo_rlhf.feedback.given import as_text

    if messages and all(isinstance(one.get("content"), str) for one in messages):
        prompt, metadata = as_text(messages), {**metadata, "messages": list(messages)}
    return NewTask(key, prompt, answers, priority, metadata)
