"""The one loop over records: their fields named as ours, their form made a known one, the bad ones counted."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_rlhf.data.chats import is_empty
from nemo_rlhf.data.files import ArrowRecord, CsvRecord, Source, locate_records
from nemo_rlhf.data.forms import Purpose, as_known
from nemo_rlhf.data.jsons import LISTS_OF_ONE_RECORD
from nemo_rlhf.data.messages import ROLES, without_nulls
from nemo_rlhf.untrusted import parse_json

OnError = Literal["stop", "skip", "note"]
MAX_NAMED = 20
WHAT: dict[str, str] = {
    "sft": "text",
    "prompts": "prompt",
    "pairs": "pair",
    "scores": "scored text",
    "dialogues": "dialogue",
}
# What a template writes, where a key with null is not the same as none. Elsewhere a null is the user's.
_CHAT_FIELDS = ("functions", "chat_template_kwargs", "response", *LISTS_OF_ONE_RECORD)
_NUMBERS = ("score", "reward", "margin")
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}
# Names that a file of prompts need not have, because they are meant for another file of the same run.
_NOT_OF_PROMPTS = {"response", "chosen", "rejected", "margin", "score", "reward", "rewards", "turns", "done"}


@dataclass
class Intake:
    """How records are taken in, and what became of them so far.

    ``fields``: what the user's records call a field that ours call otherwise ({"prompt": "question"}), a dotted path
    where it lies within another. ``on_error``: "stop" raises once all records have been read, "skip" leaves the bad
    ones out with a warning, and "note" without. ``drops_empty_turns``: of chats, instead of their being bad records.
    ``forms`` counts records of each form, ``num_empty_turns`` turns that were dropped; ``refused`` has a sentence for
    every bad record.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    on_error: OnError = "stop"
    drops_empty_turns: bool = False
    num_empty_turns: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)

    def records(self, source: Source, purpose: Purpose) -> Iterator[tuple[str, Any]]:
        """Yields (place, record) of a source, each in a form that the reader for ``purpose`` knows.

        What the caller finds wrong with one it must raise within ``noted()``. Raises ValueError, when all were read,
        as ``on_error`` says, or where the source is none or lacks what ``fields`` names.
        """
        before, count, num_read, num_lost, has_halves = len(self.refused), 0, 0, 0, False
        missing = {name for name in self.fields if purpose != "prompts" or name not in _NOT_OF_PROMPTS}
        half: tuple[str, Any] | None = None
        for where, given in locate_records(source, WHAT[purpose]):
            count += 1
            known: list[tuple[str, Any]] = []
            with self.noted():
                if isinstance(given, ValueError):
                    raise given
                num_read += 1
                record = self.renamed(given, missing)
                if self.drops_empty_turns:
                    record = self._without_empty_turns(record)
                form, known = as_known(where, record, purpose)
                self.forms[form] += 1
            num_lost += not known
            for place, one in known:
                if purpose != "pairs" or "chosen" in one:
                    yield place, one
                elif half is None:
                    half, has_halves = (place, one), True
                else:  # NeMo-Aligner's pairs: the better one stands on the line before
                    yield place, {"chosen": half[1]["text"], "rejected": one["text"]}
                    half = None
        if missing and num_read:
            names = ", ".join(f"{name}: {self.fields[name]}" for name in sorted(missing))
            raise ValueError(f"data.fields={{{names}}} names what no record of {_name(source)} has.")
        if num_lost and has_halves and self.on_error == "skip":
            raise ValueError(
                f'{_name(source)}: {{"text"}} lines make pairs, and which belong together is not known once one is '
                f"left out: mend it, for data.on_error=skip cannot ({self.refused[before]})"
            )
        if half is not None:
            self.refused.append(
                f'{half[0]} is the last of an odd number of {{"text"}} lines: its rejected half is missing.'
            )
        self._conclude(self.refused[before:], count, source, purpose)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Takes down the ValueError of a bad record, so that the others are read."""
        try:
            yield
        except ValueError as error:
            self.refused.append(str(error))

    def renamed(self, given: Any, missing: set[str] | None = None) -> Any:
        """A record with our names for its fields, which are taken out of ``missing``, and without what its kind of file
        added to it."""
        if not isinstance(given, dict):
            return given
        record = dict(given)
        for name, path in self.fields.items():
            found, value = _look_up(given, path)
            if found:
                (missing or set()).discard(name)
                if path in given and path not in self.fields:
                    record.pop(path, None)
                record[name] = value
        if isinstance(given, ArrowRecord):
            for name in _CHAT_FIELDS:
                if isinstance(record.get(name), (list, dict)):
                    record[name] = without_nulls(record[name])
        return _typed(record) if isinstance(given, CsvRecord) else record

    def _without_empty_turns(self, record: Any) -> Any:
        if not isinstance(record, dict):
            return record
        record = dict(record)
        for name, value in record.items():
            if name in LISTS_OF_ONE_RECORD and isinstance(value, (list, tuple)):
                kept = [one for one in value if not _says_nothing(one)]
                self.num_empty_turns += len(value) - len(kept)
                record[name] = kept
        return record

    def _conclude(self, refused: list[str], count: int, source: Source, purpose: Purpose) -> None:
        if not refused or self.on_error == "note":
            return
        if len(refused) == 1 and self.on_error == "stop":
            raise ValueError(refused[0])
        named = "".join(f"\n  {sentence}" for sentence in refused[:MAX_NAMED])
        more = len(refused) - MAX_NAMED
        named += f"\n  and {more} more" if more > 0 else ""
        bad = f"{len(refused)} of {count} {WHAT[purpose]}s of {_name(source)}"
        if self.on_error == "stop":
            raise ValueError(f"{bad} cannot be used; data.on_error=skip would leave them out:{named}")
        if len(refused) >= count:
            raise ValueError(f"{bad} cannot be used, so that none is left:{named}")
        warnings.warn(f"{bad} are left out (data.on_error=skip):{named}", stacklevel=3)


def _says_nothing(message: Any) -> bool:
    """Whether it is a message, of OpenAI's form or of ShareGPT's, and empty."""
    if not isinstance(message, Mapping) or not ("role" in message or "from" in message):
        return False
    if "role" in message:
        return is_empty(message)
    return is_empty({"role": ROLES.get(str(message["from"]).lower()), "content": message.get("value")})


def _name(source: Source) -> str:
    return "the list" if isinstance(source, (list, tuple)) else str(source)


def _look_up(record: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    """Whether there is something in a record under this name, or along this dotted path, and what."""
    if record.get(path) is not None:
        return True, record[path]
    value: Any = record
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, (list, tuple)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return False, None
    return value is not None, value


def _typed(record: dict[str, Any]) -> dict[str, Any]:
    """A record of texts with numbers, truths and messages where there can be nothing else."""
    for name in _NUMBERS:
        if name in record:
            try:
                record[name] = float(record[name])
            except ValueError:
                continue  # the reader says what it must be
    for name, value in record.items():
        if name in LISTS_OF_ONE_RECORD and value.lstrip().startswith("[{"):
            with suppress(ValueError):  # a text that looks like messages is one
                record[name] = parse_json(value, name)
    for name in ("label", "done"):
        if name in record:
            record[name] = _TRUTHS.get(record[name].strip().lower(), record[name])
    return {name: value for name, value in record.items() if value != "" or name not in (*_NUMBERS, "label", "done")}
