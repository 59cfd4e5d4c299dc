"""What goes into the preference store and comes out of it: small frozen records, free of any database."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VERDICTS = ("first", "second", "tie", "both_bad")  # of answers in stored order
FORMS = ("pairs", "conversational")  # of what is taken out
CHOICES = ("left", "right", "tie", "both_bad")  # of answers as they are shown

MAX_TEXT = 100_000  # characters of a prompt, an answer, a task's metadata (as JSON) or a run's guidelines
MAX_NOTE = 2_000
MAX_NAME = 200  # characters of a task's key or an annotator's name


class TooLate(ValueError):
    """An answer to what is no longer the annotator's to answer; the sentence says why, the annotator just goes on."""


@dataclass(frozen=True)
class NewTask:
    """Two answers that wait to be compared. ``metadata`` is JSON, and holds what reproduces the answers."""

    key: str  # unique in its run
    prompt: str
    answers: tuple[str, str]
    priority: float = 0.0  # higher ones are shown first, of equals the older
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """What one annotator said of one task."""

    id: int
    task_id: int
    key: str
    step: int  # of the policy that wrote the answers; -1: imported
    prompt: str
    answers: tuple[str, str]
    verdict: str  # one of VERDICTS
    annotator: str
    simulated: bool
    seconds: float  # that the annotator took
    note: str
    metadata: Mapping[str, Any]  # of the task


@dataclass(frozen=True)
class Vote:
    """A comparison without its texts."""

    task_id: int
    annotator_id: int
    verdict: str
    simulated: bool


@dataclass(frozen=True)
class Refresh:
    """One refresh of the reward model from comparisons; an accuracy without held-out pairs is NaN."""

    step: int
    number: int  # 1, 2, ... in its run
    comparisons: int  # that it learned from
    held_out: int  # that it was judged by
    accuracy_before: float
    accuracy_after: float
    accepted: bool


@dataclass(frozen=True)
class Lease:
    """A task that is one annotator's to answer until ``expires_at`` (seconds since 1970), or until others take it."""

    task_id: int
    key: str
    token: str
    prompt: str
    answers: tuple[str, str]  # left and right, as shown
    swapped: bool  # the left one is the second of the stored
    step: int
    expires_at: float


@dataclass(frozen=True)
class Progress:
    """Where the annotator and the run stand."""

    answered: int  # by this annotator
    skipped: int
    mean_seconds: float | None  # of this annotator's answers; None: there are none
    agreed: int  # of this annotator's answers: those that another annotator gave, too
    compared: int  # pairs of an answer of this annotator and one of another on the same task
    answered_by_all: int
    open_tasks: int


@dataclass(frozen=True)
class Throughput:
    """What one annotator did on one day (UTC)."""

    annotator: str
    simulated: bool
    day: str  # YYYY-MM-DD
    answers: int
    mean_seconds: float


@dataclass(frozen=True)
class RunInfo:
    """A run as the store knows it."""

    id: int
    name: str
    guidelines: str
    answers_wanted: int  # by task
    undo_s: float
    created_at: float  # seconds since 1970


@dataclass(frozen=True)
class Account:
    """An annotator. ``token_id`` changes with each new invitation: a session that holds another one has ended."""

    id: int
    run_id: int
    name: str
    is_admin: bool
    simulated: bool
    token_id: str


def check_task(task: NewTask) -> None:
    """Raises ValueError for a task that the store does not take."""
    where = f"The task {task.key[:80]!r}"
    if not task.key or len(task.key) > MAX_NAME or not task.key.isprintable():
        raise ValueError(f"{where}: a key has 1 to {MAX_NAME} printable characters.")
    check_text(f"{where}: the prompt", task.prompt, may_be_empty=True)
    for answer in task.answers:
        check_text(f"{where}: an answer", answer, may_be_empty=True)
    if len(task.answers) != 2 or not math.isfinite(task.priority):
        raise ValueError(f"{where} must have two answers and a finite priority.")
    try:
        size = len(json.dumps(dict(task.metadata), allow_nan=False, ensure_ascii=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: its metadata is no JSON ({error}).") from None
    if size > MAX_TEXT:
        raise ValueError(f"{where}: its metadata has {size} characters as JSON, at most {MAX_TEXT} are stored.")


def check_text(what: str, text: Any, *, may_be_empty: bool = False) -> None:
    """Raises ValueError for what is no text, or too long a one."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is a {type(text).__name__}, and must be text.")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{what} has {len(text)} characters, at most {MAX_TEXT} are stored.")
    if not text and not may_be_empty:
        raise ValueError(f"{what} is empty.")
