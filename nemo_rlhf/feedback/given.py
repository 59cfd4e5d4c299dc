"""Pairs from outside, record by record: what a line of a file says, checked."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rlhf.feedback.accounts import check_name
from nemo_rlhf.feedback.records import MAX_NOTE, NewTask, check_task, check_text

IMPORTED_STEP = -1
IMPORTED = "import"  # the annotator of pairs that name none
_LARGEST_STEP = 2**31 - 1
_KINDS = {str: "text", int: "a whole number", bool: "true or false"}


@dataclass(frozen=True)
class GivenPair:
    """One record: the task that it is about, and what was said of it."""

    where: str
    task: NewTask
    step: int
    chosen: str
    annotator: str
    simulated: bool
    seconds: float
    note: str


def read_pair(where: str, record: Any) -> GivenPair:
    """A record in either form of ``exchange.export_records``, or with a prompt and one reply each as chat messages.

    It may say who compared ("annotator", "simulated", "seconds", "note"), which task of the run it was ("key",
    "step"), and by how much one is better ("margin").

    Raises:
        ValueError: names the place of what is none of these, is too large, or has a field that is not what it must be.
    """
    if not isinstance(record, dict):
        raise ValueError(f'{where} is a {type(record).__name__}, and must be an object with "chosen" and "rejected".')
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            raise ValueError(f'{where} has no field "{name}": a pair is {{"prompt", "chosen", "rejected"}}.')
    messages, chosen, rejected = _texts(where, record)
    prompt = messages if isinstance(messages, str) else as_text(messages)
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        check_text(f"{where}: {name}", text, may_be_empty=name == "prompt")
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same text, of which neither can be better.")
    margin = _number(where, record, "margin")
    metadata: dict[str, Any] = {} if isinstance(messages, str) else {"messages": messages}
    if margin:
        metadata["margin"] = margin
    answers = (min(chosen, rejected), max(chosen, rejected))
    key = _field(where, record, "key", str, "import-" + _digest(prompt, *answers))
    note = _field(where, record, "note", str, "")
    if len(note) > MAX_NOTE:
        raise ValueError(f"{where}: the note has {len(note)} characters, at most {MAX_NOTE} are stored.")
    pair = GivenPair(
        where=where,
        task=NewTask(key, prompt, answers, metadata=metadata),
        step=_field(where, record, "step", int, IMPORTED_STEP),
        chosen=chosen,
        annotator=_field(where, record, "annotator", str, IMPORTED),
        simulated=_field(where, record, "simulated", bool, False),
        seconds=_number(where, record, "seconds"),
        note=note,
    )
    try:
        check_name(pair.annotator)
        check_task(pair.task)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return pair


def _texts(where: str, record: dict[str, Any]) -> tuple[Any, str, str]:
    """Prompt (text or messages), chosen and rejected."""
    prompt, chosen, rejected = (record.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is not None:
        if not isinstance(prompt, str):
            prompt = _messages(where, "prompt", prompt)
        return prompt, _reply(where, "chosen", chosen), _reply(where, "rejected", rejected)
    chats = [_messages(where, name, record[name]) for name in ("chosen", "rejected")]
    if chats[0][:-1] != chats[1][:-1] or len(chats[0]) < 2:
        raise ValueError(f"{where}: without a prompt, chosen and rejected must be chats that differ in the last reply.")
    replies = [_reply(where, name, chat[-1:]) for name, chat in zip(("chosen", "rejected"), chats, strict=True)]
    return chats[0][:-1], replies[0], replies[1]


def _messages(where: str, name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{where}: {name} is a {type(value).__name__}, and must be text or a list of messages.")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'{where}: a message of {name} is no {{"role": text, "content": text}}.')
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _reply(where: str, name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(where, name, value)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"{where}: {name} must be text, or one message of the assistant where there is a prompt.")
    return messages[0]["content"]


def as_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """A chat as people read it: what a lone user says, or who says what."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _field(where: str, record: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = record.get(name)
    if value is None or (value == "" and kind is not str):  # an empty cell of a table
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}: {name} is {_brief(value)}, and must be {_KINDS[kind]}.")
    if kind is int and abs(record[name]) > _LARGEST_STEP:
        raise ValueError(f"{where}: {name} is {_brief(value)}, and must lie within {_LARGEST_STEP}.")
    return value


def _number(where: str, record: dict[str, Any], name: str) -> float:
    value = record.get(name) or 0.0
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"{where}: {name} is {_brief(value)}, and must be a number, 0 or more.")
    return number


def _brief(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]
