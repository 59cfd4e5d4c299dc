"""What annotators do, one at a time and each for themselves: take a task, answer or skip it, take the answer back.

A task is leased to one annotator at once. On PostgreSQL every transaction locks its annotator's row first and then
those of tasks; on SQLite there is one at a time anyway.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

from sqlalchemy import Connection, case, delete, exists, func, insert, or_, select, update
from sqlalchemy.orm import aliased

from nemo_rlhf.feedback.records import CHOICES, MAX_NOTE, Lease, Progress, TooLate
from nemo_rlhf.feedback.store import Store
from nemo_rlhf.feedback.tables import Annotator, Candidate, ComparisonRow, Prompt, Run, Task

LEASE_S = 600.0
# An answer counts as settled this long after it could be taken back, for whoever took it back in the last moment.
_GRACE_S = 1.0
_LAST_ID = 2**31 - 1  # that PostgreSQL compares with one of its own
_NO_LEASE: dict[str, Any] = dict.fromkeys(("lease_holder", "lease_token", "lease_swapped", "lease_from", "lease_until"))


class Desk:
    """One annotator of one run. Every change is durable when the call returns.

    All calls raise ValueError where the annotator has no access (any more).
    """

    def __init__(self, store: Store, run_id: int, annotator_id: int, *, lease_s: float = LEASE_S) -> None:
        self.database = store.database
        self.run_id = run_id
        self.annotator_id = annotator_id
        self.lease_s = lease_s

    def next(self) -> Lease | None:
        """The task to answer now: the one that this annotator has on lease, or else the first one that waits, is on
        nobody's lease and was neither answered nor skipped by this annotator. None: there is none."""
        with self.database.write() as connection:
            self._lock_annotator(connection)
            return self._next(connection, self.database.now(connection))

    def answer(self, token: str, choice: str, seconds: float, note: str = "") -> None:
        """Say which answer of a lease is better, as they were shown: "left", "right", "tie" or "both_bad".

        ``seconds``: that it took; more than went by since the lease began is cut to that.

        Raises:
            TooLate: answered already; or the lease ran out and the task went to somebody else.
            ValueError: the choice is none, or the note too long.
        """
        if choice not in CHOICES:
            raise ValueError(f"The choice is {choice!r}, and must be one of {', '.join(CHOICES)}.")
        if len(note) > MAX_NOTE:
            raise ValueError(f"The note has {len(note)} characters, at most {MAX_NOTE} are stored.")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"The seconds are {seconds}, and must be a number, 0 or more.")
        self._close(token, choice, seconds, note)

    def skip(self, token: str) -> None:
        """Give a lease back unanswered; the task goes to others and never comes back. Raises as ``answer`` does."""
        self._close(token, "skip", 0.0, "")

    def undo(self) -> tuple[bool, Lease | None]:
        """Take back the last answer or skip, as long as the run allows it, and get its task again. False: there was
        nothing to take back. Where others are at that task by now, or have answered it as often as was wanted, this
        gives the next one instead, None where there is none."""
        with self.database.write() as connection:
            self._lock_annotator(connection)
            now = self.database.now(connection)
            last = self._last(connection, now)
            if last is None:
                return False, None
            task = self._lock_for_undo(connection, last.task_id)
            connection.execute(delete(ComparisonRow).where(ComparisonRow.id == last.id))
            num_answers = task.num_answers - (last.verdict != "skip")
            is_open = num_answers < last.answers_wanted  # not where others answered what was skipped
            connection.execute(update(Task).where(Task.id == task.id).values(is_open=is_open, num_answers=num_answers))
            connection.execute(update(Task).where(Task.lease_holder == self.annotator_id).values(**_NO_LEASE))
            is_free = task.lease_holder in (None, self.annotator_id) or task.lease_until <= now
            if is_open and is_free:
                return True, self._lease(connection, task.id, now)
            return True, self._next(connection, now)

    def progress(self) -> Progress:
        other = aliased(ComparisonRow)
        mine = ComparisonRow.annotator_id == self.annotator_id
        answered = ComparisonRow.verdict != "skip"
        with self.database.read() as connection:
            num, skipped, mean = connection.execute(
                select(
                    func.count(case((answered, 1))),
                    func.count(case((ComparisonRow.verdict == "skip", 1))),
                    func.avg(case((answered, ComparisonRow.seconds))),
                ).where(mine)
            ).one()
            agreed, compared = connection.execute(
                select(func.count(case((other.verdict == ComparisonRow.verdict, 1))), func.count())
                .select_from(ComparisonRow)
                .join(other, other.task_id == ComparisonRow.task_id)
                .where(mine, answered, other.annotator_id != self.annotator_id, other.verdict != "skip")
            ).one()
            by_all = connection.scalar(select(func.count()).where(ComparisonRow.run_id == self.run_id, answered))
            waiting = connection.scalar(select(func.count()).where(Task.run_id == self.run_id, Task.is_open))
        return Progress(num, skipped, mean and float(mean), agreed, compared, by_all or 0, waiting or 0)

    def _last(self, connection: Connection, now: float) -> Any:
        """The last answer or skip, while it can be taken back."""
        return connection.execute(
            select(ComparisonRow.id, ComparisonRow.task_id, ComparisonRow.verdict, Run.answers_wanted)
            .join(Run, Run.id == ComparisonRow.run_id)
            .where(
                ComparisonRow.annotator_id == self.annotator_id,
                ComparisonRow.answered_at > now - Run.undo_s,
                ComparisonRow.settles_at > now,
            )
            .order_by(ComparisonRow.answered_at.desc(), ComparisonRow.id.desc())
            .limit(1)
        ).one_or_none()

    def _lock_for_undo(self, connection: Connection, task_id: int) -> Any:
        """This task, locked together with the one on lease: in the same order by everybody, or two could wait for each
        other."""
        tasks = connection.execute(
            select(Task)
            .where(or_(Task.id == task_id, Task.lease_holder == self.annotator_id))
            .order_by(Task.id)
            .with_for_update(key_share=True)
        ).all()
        return next(task for task in tasks if task.id == task_id)

    def _lock_annotator(self, connection: Connection) -> None:
        row = connection.execute(
            select(Annotator.revoked_at)
            .where(Annotator.id == self.annotator_id, Annotator.run_id == self.run_id)
            .with_for_update(key_share=True)
        ).one_or_none()
        if row is None or row.revoked_at is not None:
            raise ValueError("This annotator has no access to the run (any more).")

    def _next(self, connection: Connection, now: float) -> Lease | None:
        own = connection.scalar(
            select(Task.id)
            .where(Task.lease_holder == self.annotator_id)
            .order_by(Task.id)
            .limit(1)
            .with_for_update(skip_locked=True, key_share=True)
        )
        if own is not None:
            return self._lease(connection, own, now, renew=True)
        seen = exists().where(ComparisonRow.annotator_id == self.annotator_id, ComparisonRow.task_id == Task.id)
        free = connection.scalar(
            select(Task.id)
            .where(
                Task.run_id == self.run_id,
                Task.is_open.is_(True),
                or_(Task.lease_until.is_(None), Task.lease_until <= now),
                ~seen,
            )
            .order_by(Task.rank, Task.id)
            .limit(1)
            .with_for_update(skip_locked=True, key_share=True, of=Task)
        )
        return None if free is None else self._lease(connection, free, now)

    def _lease(self, connection: Connection, task_id: int, now: float, *, renew: bool = False) -> Lease:
        """Put the task, which is locked, on this annotator's lease; ``renew`` keeps its token and its order."""
        values: dict[str, Any] = {"lease_until": now + self.lease_s}
        if not renew:
            values |= {
                "lease_holder": self.annotator_id,
                "lease_token": f"{task_id}-{secrets.token_urlsafe(16)}",
                "lease_swapped": secrets.choice((False, True)),
                "lease_from": now,
            }
        connection.execute(update(Task).where(Task.id == task_id).values(**values))
        first, second = aliased(Candidate), aliased(Candidate)
        row = connection.execute(
            select(
                Task.key,
                Task.lease_token,
                Task.lease_swapped,
                Prompt.text,
                first.step,
                first.text.label("first"),
                second.text.label("second"),
            )
            .join(Prompt, Prompt.id == Task.prompt_id)
            .join(first, first.id == Task.first_id)
            .join(second, second.id == Task.second_id)
            .where(Task.id == task_id)
        ).one()
        return Lease(
            task_id=task_id,
            key=row.key,
            token=row.lease_token,
            prompt=row.text,
            answers=(row.second, row.first) if row.lease_swapped else (row.first, row.second),
            swapped=row.lease_swapped,
            step=row.step,
            expires_at=now + self.lease_s,
        )

    def _close(self, token: str, choice: str, seconds: float, note: str) -> None:
        with self.database.write() as connection:
            self._lock_annotator(connection)
            task = self._leased(connection, token)
            run = connection.execute(select(Run.answers_wanted, Run.undo_s).where(Run.id == self.run_id)).one()
            now = self.database.now(connection)
            connection.execute(
                insert(ComparisonRow).values(
                    run_id=self.run_id,
                    task_id=task.id,
                    annotator_id=self.annotator_id,
                    verdict=_stored(choice, task.lease_swapped),
                    seconds=min(seconds, max(0.0, now - task.lease_from)),
                    note=note,
                    answered_at=now,
                    settles_at=now + (run.undo_s + _GRACE_S if run.undo_s else 0.0),
                )
            )
            num_answers = task.num_answers + (choice != "skip")
            connection.execute(
                update(Task)
                .where(Task.id == task.id)
                .values(num_answers=num_answers, is_open=num_answers < run.answers_wanted, **_NO_LEASE)
            )

    def _leased(self, connection: Connection, token: str) -> Any:
        """The task of this token, locked. It may have run out, as long as nobody else has taken the task since."""
        number = token.partition("-")[0]
        if not number.isascii() or not number.isdecimal() or len(number) > 10 or int(number) > _LAST_ID:
            raise TooLate("There is no such task: go on with the next one.")
        task = connection.execute(
            select(Task).where(Task.id == int(number), Task.run_id == self.run_id).with_for_update(key_share=True)
        ).one_or_none()
        if task is not None and task.lease_holder == self.annotator_id and _same(task.lease_token, token):
            return task
        answered = connection.scalar(
            select(ComparisonRow.id).where(
                ComparisonRow.annotator_id == self.annotator_id, ComparisonRow.task_id == int(number)
            )
        )
        if answered is not None:
            raise TooLate("You have answered or skipped this task already: go on with the next one.")
        raise TooLate("This task went to somebody else when its time had run out: go on with the next one.")


def _stored(choice: str, swapped: bool) -> str:
    if choice not in ("left", "right"):
        return choice
    return "second" if (choice == "left") == swapped else "first"


def _same(one: str, other: str) -> bool:
    return secrets.compare_digest(one.encode(), other.encode("utf-8", "replace"))
