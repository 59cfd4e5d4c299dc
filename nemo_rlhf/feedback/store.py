"""The preference store as a run sees it: tasks go in, comparisons come out. Annotators work at a ``Desk``."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, cast, delete, exists, func, insert, or_, select, update
from sqlalchemy import Integer as IntegerType
from sqlalchemy.orm import aliased

from nemo_rlhf.feedback.database import Database
from nemo_rlhf.feedback.records import (
    Comparison,
    NewTask,
    Refresh,
    RunInfo,
    Throughput,
    Vote,
    check_task,
    check_text,
)
from nemo_rlhf.feedback.tables import Annotator, Candidate, ComparisonRow, Prompt, RefreshRow, Run, Task

_MAX_RUN_NAME = 1000
_NEW_RUN = {"guidelines": "", "answers_wanted": 1, "undo_s": 60.0}
_AT_ONCE = 500  # values of one query, of which SQLite once took 999
_DAY_S = 86400


class Store:
    """One database with the runs in it. Threads may share one; each process opens its own."""

    def __init__(self, database: Database) -> None:
        self.database = database

    @classmethod
    def open(cls, url: str) -> Store:
        """``sqlite:///FILE``, the path of that file, or ``postgresql://...``; its tables are brought up to date.

        Raises:
            ValueError: there is no such place, it cannot be reached, it holds something else, or a newer store.
        """
        return cls(Database(url))

    def close(self) -> None:
        self.database.engine.dispose()

    def run(
        self,
        name: str,
        *,
        create: bool = False,
        guidelines: str | None = None,
        answers_wanted: int | None = None,
        undo_s: float | None = None,
    ) -> int:
        """The id of a run. With ``create`` it is made where it is missing (one answer by task, which can be taken back
        for 60 s, unless these say otherwise). Settings that are given replace those of before from now on.
        ``name``: of ``run_name``, or any other.

        Raises:
            ValueError: there is no such run (it names those that there are), or a setting is out of range.
        """
        if not name or len(name) > _MAX_RUN_NAME or not name.isprintable():
            raise ValueError(f"The name of a run has 1 to {_MAX_RUN_NAME} printable characters, not {name[:80]!r}.")
        if answers_wanted is not None and answers_wanted < 1:
            raise ValueError(f"answers_wanted is {answers_wanted}: a task wants 1 answer or more.")
        if undo_s is not None and not 0 <= undo_s < math.inf:
            raise ValueError(f"undo_s is {undo_s}, and must be a number of seconds, 0 or more.")
        if guidelines is not None:
            check_text("The guidelines", guidelines, may_be_empty=True)
        with self.database.write(exclusive=True) as connection:
            run_id = connection.scalar(select(Run.id).where(Run.name == name))
            if run_id is None and not create:
                raise ValueError(self._no_such_run(connection, name))
            given: dict[str, Any] = {"guidelines": guidelines, "answers_wanted": answers_wanted, "undo_s": undo_s}
            values = {name: value for name, value in given.items() if value is not None}
            if run_id is None:
                values = {"name": name, **_NEW_RUN, **values, "created_at": self.database.now(connection)}
                return int(connection.execute(insert(Run).values(**values).returning(Run.id)).scalar_one())
            if values:
                connection.execute(update(Run).where(Run.id == run_id).values(**values))
            return int(run_id)

    def find_run(self, name: str) -> int | None:
        """The id of a run, or None: there is none of this name (yet)."""
        with self.database.read() as connection:
            return connection.scalar(select(Run.id).where(Run.name == name))

    def info(self, run_id: int) -> RunInfo:
        with self.database.read() as connection:
            row = connection.execute(
                select(Run.id, Run.name, Run.guidelines, Run.answers_wanted, Run.undo_s, Run.created_at).where(
                    Run.id == run_id
                )
            ).one()
        return RunInfo(*row)

    def add_tasks(self, run_id: int, step: int, tasks: Sequence[NewTask]) -> int:
        """Adds all of them or none, and returns how many were new: a key that is there already stays as it is.

        ``step``: of the policy that wrote the answers. Raises ValueError for a task that is too large or no task.
        """
        for task in tasks:
            check_task(task)
        with self.database.write(exclusive=True) as connection:
            return len(self.insert_tasks(connection, run_id, step, tasks))

    def settled_ids(self, run_id: int) -> list[int]:
        """Ids of the comparisons that nobody can take back any more, ascending; skipped tasks are none."""
        with self.database.read() as connection:
            return list(
                connection.scalars(
                    select(ComparisonRow.id)
                    .where(
                        ComparisonRow.run_id == run_id,
                        ComparisonRow.verdict != "skip",
                        ComparisonRow.settles_at <= self.database.now(connection),
                    )
                    .order_by(ComparisonRow.id)
                )
            )

    def may_grow(self, run_id: int) -> bool:
        """Whether there may be more settled comparisons without more tasks: some wait for answers, or answers can still
        be taken back."""
        with self.database.read() as connection:
            now = self.database.now(connection)
            unsettled = exists().where(
                ComparisonRow.run_id == run_id, ComparisonRow.verdict != "skip", ComparisonRow.settles_at > now
            )
            waiting = exists().where(Task.run_id == run_id, Task.is_open)
            return bool(connection.scalar(select(or_(waiting, unsettled))))

    def comparisons(self, ids: Sequence[int]) -> list[Comparison]:
        """These comparisons, in the order asked, without those that are none (any more)."""
        found: dict[int, Comparison] = {}
        with self.database.read() as connection:
            for start in range(0, len(ids), _AT_ONCE):
                rows = connection.execute(
                    _whole_comparisons().where(ComparisonRow.id.in_(ids[start : start + _AT_ONCE]))
                )
                found |= {row.id: _comparison(row) for row in rows}
        return [found[one] for one in ids if one in found]

    def comparison_ids(self, run_id: int) -> list[int]:
        """Ids of all comparisons as they stand now, ascending; skipped tasks are none."""
        with self.database.read() as connection:
            return list(
                connection.scalars(
                    select(ComparisonRow.id)
                    .where(ComparisonRow.run_id == run_id, ComparisonRow.verdict != "skip")
                    .order_by(ComparisonRow.id)
                )
            )

    def votes(self, run_id: int) -> list[Vote]:
        """All comparisons as they stand now, without texts, by id."""
        with self.database.read() as connection:
            rows = connection.execute(
                select(ComparisonRow.task_id, ComparisonRow.annotator_id, ComparisonRow.verdict, Annotator.simulated)
                .join(Annotator, Annotator.id == ComparisonRow.annotator_id)
                .where(ComparisonRow.run_id == run_id, ComparisonRow.verdict != "skip")
                .order_by(ComparisonRow.id)
            )
            return [Vote(*row) for row in rows]

    def throughput(self, run_id: int) -> list[Throughput]:
        """By annotator and day, the last day first."""
        day = cast(func.floor(ComparisonRow.answered_at / _DAY_S), IntegerType)
        with self.database.read() as connection:
            rows = connection.execute(
                select(Annotator.name, Annotator.simulated, day, func.count(), func.avg(ComparisonRow.seconds))
                .join(Annotator, Annotator.id == ComparisonRow.annotator_id)
                .where(ComparisonRow.run_id == run_id, ComparisonRow.verdict != "skip")
                .group_by(Annotator.id, Annotator.name, Annotator.simulated, day)
                .order_by(day.desc(), Annotator.name)
            )
            return [Throughput(name, simulated, _date(day), n, float(mean)) for name, simulated, day, n, mean in rows]

    def queue_length(self, run_id: int) -> int:
        """Tasks that wait for answers."""
        with self.database.read() as connection:
            return connection.scalar(select(func.count()).where(Task.run_id == run_id, Task.is_open)) or 0

    def add_refresh(self, run_id: int, refresh: Refresh) -> None:
        """A refresh with this number replaces those with this and later numbers: a run that went on from an earlier
        checkpoint does again what it did after it."""
        values = {name: _nan_to_none(value) for name, value in vars(refresh).items()}
        with self.database.write(exclusive=True) as connection:
            connection.execute(
                delete(RefreshRow).where(RefreshRow.run_id == run_id, RefreshRow.number >= refresh.number)
            )
            connection.execute(
                insert(RefreshRow).values(run_id=run_id, created_at=self.database.now(connection), **values)
            )

    def refreshes(self, run_id: int) -> list[Refresh]:
        """All of them, by number."""
        names = Refresh.__dataclass_fields__
        with self.database.read() as connection:
            rows = connection.execute(
                select(*(getattr(RefreshRow, name) for name in names))
                .where(RefreshRow.run_id == run_id)
                .order_by(RefreshRow.number)
            )
            return [Refresh(**{name: _none_to_nan(row[name]) for name in names}) for row in rows.mappings()]

    def _no_such_run(self, connection: Connection, name: str) -> str:
        names = list(connection.scalars(select(Run.name).order_by(Run.id.desc()).limit(5)))
        has = (
            f"it has {', '.join(names)}" if names else "it has none yet, a run with ppo.feedback or an import adds one"
        )
        return f"The store {self.database.shown_url} has no run {name}: {has}."

    def insert_tasks(
        self, connection: Connection, run_id: int, step: int, tasks: Sequence[NewTask], **values: Any
    ) -> dict[str, int]:
        """``add_tasks`` within a transaction and of tasks that were checked: ids of the new ones by key. ``values``:
        columns that are not as those of a task that waits."""
        new: dict[str, NewTask] = {}
        for task in tasks:
            new.setdefault(task.key, task)
        for key in _which(connection, Task.key, Task.run_id == run_id, list(new)):
            del new[key]
        if not new:
            return {}
        prompts = self._prompt_ids(connection, run_id, {task.prompt for task in new.values()})
        candidates = list(
            connection.scalars(
                insert(Candidate).returning(Candidate.id, sort_by_parameter_order=True),
                [
                    {"prompt_id": prompts[task.prompt], "step": step, "text": answer}
                    for task in new.values()
                    for answer in task.answers
                ],
            )
        )
        now = self.database.now(connection)
        rows = [
            {
                "run_id": run_id,
                "key": task.key,
                "prompt_id": prompts[task.prompt],
                "first_id": first,
                "second_id": second,
                "rank": -task.priority,
                "details": dict(task.metadata),
                "created_at": now,
                "is_open": True,
                "num_answers": 0,
                **values,
            }
            for task, first, second in zip(new.values(), candidates[::2], candidates[1::2], strict=True)
        ]
        ids = connection.scalars(insert(Task).returning(Task.id, sort_by_parameter_order=True), rows)
        return dict(zip(new, ids, strict=True))

    def _prompt_ids(self, connection: Connection, run_id: int, texts: set[str]) -> dict[str, int]:
        by_digest = {_digest(text): text for text in sorted(texts)}
        ids = _which(connection, Prompt.digest, Prompt.run_id == run_id, list(by_digest), Prompt.id)
        if new := [digest for digest in by_digest if digest not in ids]:
            made = connection.scalars(
                insert(Prompt).returning(Prompt.id, sort_by_parameter_order=True),
                [{"run_id": run_id, "digest": digest, "text": by_digest[digest]} for digest in new],
            )
            ids |= dict(zip(new, made, strict=True))
        return {text: ids[digest] for digest, text in by_digest.items()}


def run_name(run_dir: str | Path) -> str:
    """What a run is called in the store unless it is given another name: the absolute path of its directory."""
    return str(Path(run_dir).expanduser().resolve())


def _which(
    connection: Connection, column: Any, condition: Any, values: Sequence[str], value: Any = None
) -> dict[str, Any]:
    """Those of ``values`` that ``column`` has where ``condition`` holds, each with its ``value``."""
    found: dict[str, Any] = {}
    for start in range(0, len(values), _AT_ONCE):
        rows = connection.execute(
            select(column, column if value is None else value).where(
                condition, column.in_(values[start : start + _AT_ONCE])
            )
        )
        found |= {row[0]: row[1] for row in rows}
    return found


def _whole_comparisons() -> Any:
    first, second = aliased(Candidate), aliased(Candidate)
    return (
        select(
            ComparisonRow.id,
            ComparisonRow.task_id,
            Task.key,
            first.step,
            Prompt.text.label("prompt"),
            first.text.label("first"),
            second.text.label("second"),
            ComparisonRow.verdict,
            Annotator.name.label("annotator"),
            Annotator.simulated,
            ComparisonRow.seconds,
            ComparisonRow.note,
            Task.details,
        )
        .join(Task, Task.id == ComparisonRow.task_id)
        .join(Prompt, Prompt.id == Task.prompt_id)
        .join(first, first.id == Task.first_id)
        .join(second, second.id == Task.second_id)
        .join(Annotator, Annotator.id == ComparisonRow.annotator_id)
    )


def _comparison(row: Any) -> Comparison:
    return Comparison(
        id=row.id,
        task_id=row.task_id,
        key=row.key,
        step=row.step,
        prompt=row.prompt,
        answers=(row.first, row.second),
        verdict=row.verdict,
        annotator=row.annotator,
        simulated=row.simulated,
        seconds=row.seconds,
        note=row.note,
        metadata=row.details,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _nan_to_none(value: Any) -> Any:
    """SQLite has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _none_to_nan(value: Any) -> Any:
    return math.nan if value is None else value


def _date(day: int) -> str:
    return (datetime.date(1970, 1, 1) + datetime.timedelta(days=day)).isoformat()
