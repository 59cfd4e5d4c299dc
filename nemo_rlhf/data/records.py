"""What stands in a record, checked; every message begins with the words that say where the record stands."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


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
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: the reward {repr(value)[:100]} is not a number.") from None
    if isinstance(value, (str, bool)) or not math.isfinite(number):
        raise ValueError(f"{where}: the reward {value!r} is not a finite number.")
    return number


def score_of(where: str, record: Mapping[str, Any]) -> float:
    """A record's "score" or "reward". Raises ValueError where it has none, or both, or no finite number."""
    found = [name for name in ("score", "reward") if record.get(name) is not None]
    if not found:
        raise missing_field(where, record, ("score", "reward"))
    if len(found) > 1:
        raise ValueError(f'{where} has both "score" and "reward": give one of them.')
    return finite_reward(where, record[found[0]])


def margin_of(where: str, margin: Any) -> float:
    """By how much one response is better. Raises ValueError for what is no number of 0 or more."""
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < math.inf:
        raise ValueError(f"{where}: the margin {margin!r} must be a number, 0 or more.")
    return float(margin)


def total_reward(where: str, record: Any) -> float:
    """The reward of a record, or the sum of its rewards. Raises ValueError where they are missing or not finite."""
    given = rewards_of(where, record)
    return sum(finite_reward(where, value) for value in (given if isinstance(given, (list, tuple)) else [given]))


def best(records: Sequence[Any], totals: Sequence[float], percent: float) -> list[Any]:
    """The best ``percent`` of ``records`` by their ``totals``, in the order they came in; at least one, and of equals
    the first."""
    ranked = sorted(range(len(records)), key=lambda index: totals[index], reverse=True)
    return [records[index] for index in sorted(ranked[: max(1, math.ceil(len(records) * percent / 100))])]
