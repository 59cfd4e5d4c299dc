"""Names and types of keys: what a dataclass has, what a wrong name was meant to be, and a type in words."""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

_TYPE_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_ITEM_WORDS = {int: "integers, as [a,b]", float: "numbers, as [a,b]", str: "texts, as [a,b]"}


@cache
def schema_keys(schema: type) -> Mapping[str, Any]:
    """Type of every key that holds a value, by dotted name."""
    keys: dict[str, Any] = {}
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            keys.update({f"{name}.{key}": inner for key, inner in schema_keys(hint).items()})  # type: ignore[arg-type]
        else:
            keys[name] = hint
    return keys


def nearest_key(key: str, keys: Collection[str]) -> str:
    """The existing key that ``key`` was most likely meant to be, by spelling as a whole and of its last word."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    return max(keys, key=likeness)


def expected(hint: Any) -> str:
    """A type hint of the schema in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(inner) for inner in get_args(hint))
    if origin is list:
        return f"a list of {_ITEM_WORDS.get(get_args(hint)[0], 'mappings, as [{name: value}]')}"
    if origin is dict:
        return "a mapping, as {name: value}"
    return _TYPE_WORDS.get(hint, "a value")
