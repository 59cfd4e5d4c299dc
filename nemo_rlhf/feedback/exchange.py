"""Comparisons as pairs, to and from files that other tools read.

A pair says that one answer is better. A tie or two bad answers say no such thing: as pairs both ways they would pull a
reward model nowhere and halve its accuracy on them, so that they are left out; so are pairs with an empty answer, of
which no reward model can learn, and with two equal ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update
from sqlalchemy.orm import aliased

from nemo_rlhf.feedback.accounts import annotator_id
from nemo_rlhf.feedback.given import GivenPair
from nemo_rlhf.feedback.records import FORMS, Comparison
from nemo_rlhf.feedback.store import Store
from nemo_rlhf.feedback.tables import Candidate, ComparisonRow, Export, Prompt, Run, Task
from nemo_rlhf.files import alone
from nemo_rlhf.untrusted import stranger

_AT_ONCE = 500
_DATASET_INFO = "dataset_info.json"  # of a directory for datasets
_DATASET = (_DATASET_INFO, "state.json", "data-*-of-*.arrow", "cache-*.arrow")


@dataclass
class _Taken:
    """What was taken out so far."""

    pairs: int = 0
    last_comparison: int | None = None


def export_records(store: Store, run_id: int, form: str) -> Iterator[dict[str, Any]]:
    """The comparisons that say which answer is better, by id, one record each; noted in the table of exports when the
    last one is out. One that is taken back meanwhile may be there or not.

    ``form``: "pairs" gives ``{"prompt", "chosen", "rejected"}`` as ``nemo-rlhf reward`` reads them; "conversational"
    two whole chats, ``{"chosen": [messages], "rejected": [messages]}``, as Hugging Face's tools do. A prompt is a
    chat where the task's metadata has it as "messages". Both also say who compared (and whether that was simulated),
    how long it took, the note, the task's key, the policy's step, and the margin where the metadata has one.
    """
    taken = _Taken()
    yield from _records(store, run_id, form, taken)
    _note(store, run_id, form, taken)


def _records(store: Store, run_id: int, form: str, taken: _Taken) -> Iterator[dict[str, Any]]:
    assert form in FORMS
    ids = store.comparison_ids(run_id)
    for start in range(0, len(ids), _AT_ONCE):
        for comparison in store.comparisons(ids[start : start + _AT_ONCE]):
            taken.last_comparison = comparison.id
            if (record := _record(comparison, form)) is not None:
                taken.pairs += 1
                yield record


def _note(store: Store, run_id: int, form: str, taken: _Taken) -> None:
    with store.database.write() as connection:
        values = {"run_id": run_id, "form": form, "created_at": store.database.now(connection), **vars(taken)}
        connection.execute(insert(Export).values(**values))


def export_file(store: Store, run_id: int, form: str, out: Path, *, force: bool = False) -> int:
    """``export_records`` as a jsonl file, or where ``out`` has no suffix as a directory for ``datasets``. Returns how
    many; ``out`` appears when it is whole.

    Raises:
        ValueError: ``out`` has another suffix, is there already (unless ``force``), is there and no data set, or lies
            nowhere; or no pair is.
    """
    if out.suffix not in ("", ".jsonl"):
        raise ValueError(f"{out} is neither a .jsonl file nor a directory without suffix, for datasets.")
    if out.exists() and not force:
        raise ValueError(f"{out} is there already: name another one, or replace it with --force.")
    if out.exists() and out.is_dir() != (out.suffix == ""):
        raise ValueError(f"{out} cannot be replaced: it is {'a directory' if out.is_dir() else 'a file'}.")
    if out.is_symlink():
        raise ValueError(f"{out} is a link to {out.readlink()}: name what it leads to, or something new.")
    if out.is_dir() and any(out.iterdir()) and (other := _no_dataset(out)):
        raise ValueError(f"{out} holds {other}, which is not replaced: name another directory.")
    if out.is_dir() and Path.cwd().is_relative_to(out.resolve()):
        raise ValueError(f"{out} is where this command runs, which is not replaced: name another directory.")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"There is no directory {out.absolute().parent} for {out.name}: create it first.")
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    taken = _Taken()
    with alone(out):
        try:
            _remove(partial)
            (_write_lines if out.suffix else _write_dataset)(_records(store, run_id, form, taken), partial)
            if not taken.pairs:
                raise ValueError("There is nothing to export: no comparison says which answer is better.")
            _publish(partial, out)
        finally:
            _remove(partial)
    _note(store, run_id, form, taken)
    return taken.pairs


def _no_dataset(directory: Path) -> str | None:
    """What makes a directory more than a data set, or none; None where nothing does."""
    if not (directory / _DATASET_INFO).is_file():
        return "something else than a data set"
    other = stranger(directory, _DATASET)
    return None if other is None else f"{other} beside a data set"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _publish(partial: Path, out: Path) -> None:
    """What was at ``out`` goes when the new one has its place."""
    replaced = out.with_name(f".{out.name}.replaced")
    if out.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    try:
        partial.rename(out)
    except OSError:
        if replaced.is_dir() and not out.exists():
            replaced.rename(out)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def import_pairs(store: Store, run_id: int, pairs: Sequence[GivenPair]) -> tuple[int, int]:
    """Take pairs in, all of them or none. Returns how many were new and how many were there already.

    Two answers to one prompt are one task, whoever compared them.

    Raises:
        ValueError: names the record that disagrees with what is there, or with one before it by the same annotator.
    """
    num_new = 0
    said: dict[tuple[int, int], str] = {}
    with store.database.write(exclusive=True) as connection:
        for start in range(0, len(pairs), _AT_ONCE):
            num_new += _import(store, connection, run_id, pairs[start : start + _AT_ONCE], said)
    return num_new, len(pairs) - num_new


def _import(
    store: Store, connection: Connection, run_id: int, pairs: Sequence[GivenPair], said: dict[tuple[int, int], str]
) -> int:
    """How many were new. ``said``: where each annotator's word on each task stands in the file, as far as it was read;
    it grows."""
    for step in sorted({pair.step for pair in pairs}):
        tasks = [pair.task for pair in pairs if pair.step == step]
        store.insert_tasks(connection, run_id, step, tasks, is_open=False)
    tasks_there = _tasks(connection, run_id, [pair.task.key for pair in pairs])
    annotators: dict[tuple[str, bool], int] = {}
    ids = [task.id for task in tasks_there.values()]
    voted = select(ComparisonRow.annotator_id, ComparisonRow.task_id, ComparisonRow.verdict).where(
        ComparisonRow.task_id.in_(ids)
    )
    known = {(row.annotator_id, row.task_id): row.verdict for row in connection.execute(voted)}
    now = store.database.now(connection)
    rows = []
    for pair in pairs:
        task = tasks_there[pair.task.key]
        if task.prompt != pair.task.prompt or {task.first, task.second} != set(pair.task.answers):
            raise ValueError(
                f"{pair.where}: the run's task {pair.task.key} has other texts: leave the key out, or import into "
                "another run."
            )
        who = (pair.annotator, pair.simulated)
        if who not in annotators:
            annotators[who] = _annotator(connection, store, run_id, pair)
        word = (annotators[who], task.id)
        verdict = "first" if pair.chosen == task.first else "second"
        before, is_new = said.setdefault(word, pair.where), word not in known
        if known.setdefault(word, verdict) != verdict:
            raise ValueError(
                f"{pair.where} contradicts {'the store' if before == pair.where else before}, where {pair.annotator} "
                'said something else of the same two answers: name each annotator in "annotator", or leave one out.'
            )
        if not is_new:
            continue
        rows.append(
            {
                "run_id": run_id,
                "task_id": task.id,
                "annotator_id": annotators[who],
                "verdict": verdict,
                "seconds": pair.seconds,
                "note": pair.note,
                "answered_at": now,
                "settles_at": now,
            }
        )
    if rows:
        connection.execute(insert(ComparisonRow), rows)
        _count(connection, run_id, [row["task_id"] for row in rows])
    return len(rows)


def _count(connection: Connection, run_id: int, task_ids: list[int]) -> None:
    """Note one more answer of each of these tasks."""
    wanted = select(Run.answers_wanted).where(Run.id == run_id).scalar_subquery()
    for task_id in sorted(task_ids):
        connection.execute(
            update(Task)
            .where(Task.id == task_id)
            .values(num_answers=Task.num_answers + 1, is_open=and_(Task.is_open, Task.num_answers + 1 < wanted))
        )


def _annotator(connection: Connection, store: Store, run_id: int, pair: GivenPair) -> int:
    try:
        return annotator_id(connection, store, run_id, pair.annotator, simulated=pair.simulated)
    except ValueError as error:
        raise ValueError(f"{pair.where}: {error}") from None


def _tasks(connection: Connection, run_id: int, keys: list[str]) -> dict[str, Any]:
    """The tasks of these keys with their texts."""
    first, second = aliased(Candidate), aliased(Candidate)
    rows = connection.execute(
        select(Task.id, Task.key, Prompt.text.label("prompt"), first.text.label("first"), second.text.label("second"))
        .join(Prompt, Prompt.id == Task.prompt_id)
        .join(first, first.id == Task.first_id)
        .join(second, second.id == Task.second_id)
        .where(Task.run_id == run_id, Task.key.in_(set(keys)))
    )
    return {row.key: row for row in rows}


def _record(comparison: Comparison, form: str) -> dict[str, Any] | None:
    """None: it is no pair."""
    if comparison.verdict not in ("first", "second"):
        return None
    first, second = comparison.answers
    chosen, rejected = (first, second) if comparison.verdict == "first" else (second, first)
    if not chosen or not rejected or chosen == rejected:
        return None
    messages = comparison.metadata.get("messages")
    if form == "pairs":
        pair = {"prompt": messages or comparison.prompt, "chosen": chosen, "rejected": rejected}
    else:
        before = messages or [{"role": "user", "content": comparison.prompt}]
        pair = {
            name: [*before, {"role": "assistant", "content": answer}]
            for name, answer in (("chosen", chosen), ("rejected", rejected))
        }
    return {
        **pair,
        "margin": comparison.metadata.get("margin", 0.0),
        "key": comparison.key,
        "step": comparison.step,
        "annotator": comparison.annotator,
        "simulated": comparison.simulated,
        "seconds": comparison.seconds,
        "note": comparison.note,
    }


def _write_lines(records: Iterable[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="ascii") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_dataset(records: Iterable[dict[str, Any]], path: Path) -> None:
    import datasets

    rows = list(records)
    if len({type(row.get("prompt")) for row in rows}) > 1:
        raise ValueError(
            "Some prompts are text and some are chats, which no data set holds: use --form conversational."
        )
    if rows:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
