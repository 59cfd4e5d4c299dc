"""What to say of a record that is of no form: which form it comes nearest to, and how to name its fields."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

# Forms to write, for each purpose; the first of equally near ones is named.
WANTED: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "response"), ("messages",), ("text",)),
    "prompts": (("prompt",), ("text",)),
    "pairs": (("prompt", "chosen", "rejected"),),
    "scores": (("prompt", "response", "score"),),
    "dialogues": (("prompt", "response", "reward"), ("turns", "rewards")),
}
_SYNONYMS = {
    "prompt": ("question", "query", "problem", "instruction", "input", "request", "context", "user"),
    "response": ("answer", "output", "completion", "solution", "target", "reply", "assistant", "summary"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat"),
    "text": ("content", "document", "body"),
    "chosen": ("preferred", "better", "winner", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "worse", "loser", "rejected_response", "response_rejected"),
    "score": ("rating", "points", "grade", "label"),
    "reward": ("score", "rating", "return"),
    "turns": ("dialogue", "dialog"),
    "rewards": ("scores", "returns"),
}


def unknown_form(where: str, record: Mapping[str, Any], purpose: str) -> ValueError:
    """The error for a record that is of no form that serves ``purpose``."""
    names = [str(name) for name, value in record.items() if value is not None]
    has = f"it has {', '.join(json.dumps(name) for name in names[:20])}" if names else "it has no field at all"
    wanted, found = max(
        ((form, _found(form, names)) for form in WANTED[purpose]),
        key=lambda one: (len(one[1]) / len(one[0]), sum(name == meant for name, meant in one[1].items())),
    )
    missing = [name for name in wanted if name not in names]
    form = "{" + ", ".join(json.dumps(name) for name in wanted) + "}"
    renamed = {name: found[name] for name in missing if name in found}
    hint = ""
    if renamed:
        fields = ", ".join(f"{name}: {meant}" for name, meant in renamed.items())
        hint = f"; rename {' and '.join(json.dumps(one) for one in renamed.values())}, or set data.fields={{{fields}}}"
    lacks = " and ".join(json.dumps(name) for name in missing)
    return ValueError(f"{where} has no field {lacks}: {has}. The nearest form is {form}{hint}.")


def _found(form: tuple[str, ...], names: list[str]) -> dict[str, str]:
    """Which of a record's fields may be meant by those of ``form``."""
    found = {name: name for name in form if name in names}
    for name in form:
        free = [one for one in names if one not in found.values()]
        if name in found:
            continue
        near = difflib.get_close_matches(name, free, n=1) or [one for one in _SYNONYMS[name] if one in free]
        if near:
            found[name] = near[0]
    return found
