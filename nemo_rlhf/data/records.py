"""Reading records one by one, each with the words that say where it stands, for the message when it is wrong."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Source = str | Path | Sequence[Any]


def read_records(source: Source, what: str) -> Iterator[tuple[str, Any]]:
    """Yields (where, record) from a jsonl file, a directory written by ``datasets``' ``save_to_disk``, or a sequence.

    ``what`` names one record in messages ("prompt", "text"). Blank lines of a file are no records. Raises ValueError
    for a source that is missing, holds no record, is no data set or has a line that is not JSON.
    """
    if not isinstance(source, (str, Path)):
        if len(source) == 0:
            raise ValueError(f"The list of {what}s is empty.")
        yield from ((f"{what} {index}", record) for index, record in enumerate(source))
        return
    path = Path(source)
    if path.is_dir():
        records = _read_dataset(path)
    elif path.is_file():
        records = _read_lines(path)
    else:
        raise ValueError(f"There is no file {path} to read {what}s from.")
    is_empty = True
    for where_and_record in records:
        is_empty = False
        yield where_and_record
    if is_empty:
        raise ValueError(f"{path} is empty: it must hold at least one {what}.")


def missing_field(where: str, record: Mapping[str, Any], fields: Sequence[str]) -> ValueError:
    """The error for a record that has none of ``fields``, the first of which is the one to write."""
    names = [str(name) for name, value in record.items() if value is not None]
    near = [name for field in fields for name in difflib.get_close_matches(field, names, n=1)]
    has = f"it has {', '.join(json.dumps(name) for name in names)}" if names else "it has no field at all"
    wanted = " or ".join(json.dumps(field) for field in fields)
    hint = f'; rename "{near[0]}"' if near else ""
    return ValueError(f"{where} has no field {wanted}: {has}{hint}.")


def rewards_of(where: str, record: Any) -> Any:
    """What stands in a record's "reward" or "rewards". Raises ValueError where it has none, or both."""
    if not isinstance(record, dict):
        raise ValueError(f'{where} is a {type(record).__name__}, and must be an object with "reward" or "rewards".')
    found = [record[name] for name in ("reward", "rewards") if record.get(name) is not None]
    if not found:
        raise missing_field(where, record, ("reward", "rewards"))
    if len(found) > 1:
        raise ValueError(f'{where} has both "reward" and "rewards": give one of them.')
    return found[0]


def finite_reward(where: str, value: Any) -> float:
    """``value`` as a number. Raises ValueError where it is none, or NaN or infinite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: the reward {value!r} is not a number.") from None
    if isinstance(value, (str, bool)) or not math.isfinite(number):
        raise ValueError(f"{where}: the reward {value!r} is not a finite number.")
    return number


def best_records(records: Sequence[tuple[str, Any]], percent: float) -> list[tuple[str, Any]]:
    """The best ``percent`` of scored (where, record) pairs by their reward, or the sum of their rewards, in the order
    they came in; at least one, and of equals the first. Raises ValueError for a record without finite rewards."""
    totals = []
    for where, record in records:
        given = rewards_of(where, record)
        values = given if isinstance(given, (list, tuple)) else [given]
        totals.append(sum(finite_reward(where, value) for value in values))
    ranked = sorted(range(len(records)), key=lambda index: totals[index], reverse=True)
    return [records[index] for index in sorted(ranked[: max(1, math.ceil(len(records) * percent / 100))])]


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Bytes, so that only a line feed ends a line: a text file would also break at other characters within a string.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"{where} is not UTF-8: save the file in that encoding.") from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where} is not JSON ({error.msg} at column {error.colno}): each line must be one JSON object."
                ) from None


def _read_dataset(path: Path) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is a directory but no data set: give a jsonl file or what datasets' save_to_disk wrote."
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        splits = " or ".join(str(path / split) for split in dataset)
        raise ValueError(f"{path} holds several splits: give the directory of one, {splits}.")
    yield from ((f"{path}, row {index}", dict(record)) for index, record in enumerate(dataset))
