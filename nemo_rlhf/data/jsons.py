"""JSON as records: a value on each line, or one list of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from nemo_rlhf.untrusted import parse_json

Lines = Iterator[tuple[int, bytes]]
# A chat is an object that holds a list of objects, too.
LISTS_OF_ONE_RECORD = (
    *("messages", "conversations", "conversation", "turns", "prompt", "completion", "completions", "context", "input"),
    *("output", "chosen", "rejected", "preferred_output", "non_preferred_output", "tools"),
)


def read_jsons(path: Path, file: Any, suffix: str) -> Iterator[tuple[str, Any]]:
    """Yields (place, record) of a file of JSON in bytes: a value on each line; or a list of them over as many lines as
    it likes, by itself or as the only list of objects in an object. In the place of a line that is not JSON stands the
    ValueError that says so. Blank lines are no records. ``suffix``: that of its name, unpacked."""
    # Bytes, so that only a line feed ends a line: a text file would also break at other characters within a string.
    lines: Lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    first = list(_take(lines, 2))
    if first and _is_document(first, suffix == ".json"):
        yield from _document(path, first[0][0], _joined(chain(first, lines)))
        return
    for number, line in chain(first, lines):
        yield _parsed(f"{path}, line {number}", line)


def _take(lines: Lines, count: int) -> Lines:
    return (line for _, line in zip(range(count), lines, strict=False))


def _joined(lines: Lines) -> bytes:
    """The lines with the blank ones that were between them, so that counting them still tells their numbers."""
    parts: list[bytes] = []
    last = None
    for number, line in lines:
        parts += [b"\n" * (0 if last is None else number - last - 1), line]
        last = number
    return b"".join(parts)


def _is_document(first: list[tuple[int, bytes]], is_json: bool) -> bool:
    """Whether the first lines with something on them begin a value that goes on, or are all of a list of records. One
    object on one line is a record, unless the file is called json."""
    start, *others = (line.strip().removeprefix(b"\xef\xbb\xbf") for _, line in first)
    if start in (b"[", b"{") or (start[:1] == b"[" and start[-1:] == b","):
        return True
    _, value = _parsed("", start)
    if isinstance(value, ValueError):
        is_cut = start[:1] in (b"[", b"{") and start[-1:] in (b"[", b"{", b",", b":")
        return is_cut and all(isinstance(_parsed("", line)[1], ValueError) for line in others)
    if others:
        return False
    if isinstance(value, list):
        return is_json or _are_objects(value)
    return is_json and _records_within(value) is not None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _records_within(value: Any) -> str | None:
    """The field of an object that holds records, where it is no record itself."""
    if not isinstance(value, dict):
        return None
    lists = [name for name, held in value.items() if _are_objects(held)]
    return lists[0] if len(lists) == 1 and lists[0] not in LISTS_OF_ONE_RECORD else None


def _document(path: Path, line: int, data: bytes) -> Iterator[tuple[str, Any]]:
    where, value = _parsed(f"{path}, from line {line} on,", data)
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, list):
        yield from zip((f"{path}, line {number}" for number in _lines_of(data, line)), value, strict=True)
        return
    name = _records_within(value)
    if name is None:
        yield where.removesuffix(" on,"), value
        return
    yield from ((f"{path}, {name} {index}", record) for index, record in enumerate(value[name]))


def _lines_of(data: bytes, line: int) -> Iterator[int]:
    """The line on which each element of a list begins, which is known to be JSON. ``line``: that of the list."""
    text = data.decode("utf-8-sig")
    decoder = json.JSONDecoder()
    place = text.index("[") + 1
    counted = 0
    while True:
        while text[place] in " \t\r\n,":
            place += 1
        line += text.count("\n", counted, place)
        counted = place
        if text[place] == "]":
            return
        yield line
        _, place = decoder.raw_decode(text, place)


def _parsed(where: str, data: bytes) -> tuple[str, Any]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return where, ValueError(f"{where} is not UTF-8: save the file in that encoding.")
    try:
        return where, parse_json(text, where)
    except ValueError as error:
        # of a line, the json module knows no number but 1
        return where, ValueError(re.sub(r": line 1 column (\d+) \(char \d+\)", r" at column \1", str(error)))
