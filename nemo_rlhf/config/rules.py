"""What rules are made of: ranges in words, and the values of dotted keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Rule = tuple[str, Callable[[Any], bool]]

INFINITY = float("inf")
FUNCTION_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*"  # package.module:name
FRACTION: Rule = ("between 0 and 1", lambda x: 0 <= x <= 1)
POSITIVE: Rule = ("greater than 0", lambda x: 0 < x < INFINITY)
NOT_NEGATIVE: Rule = ("0 or more", lambda x: 0 <= x < INFINITY)
COUNT: Rule = ("1 or more", lambda x: x >= 1)


def has_key(cfg: Any, key: str) -> bool:
    """Whether this command has the dotted key."""
    for name in key.split("."):
        if not hasattr(cfg, name):
            return False
        cfg = getattr(cfg, name)
    return True


def value_of(cfg: Any, key: str) -> Any:
    """The value of a dotted key, None where this command has no such key."""
    for name in key.split("."):
        cfg = getattr(cfg, name, None)
    return cfg
