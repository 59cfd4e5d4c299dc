"""Fields of a ``config.json``: each of its type, and a fact that is told twice is told alike.

Where a fact has several names, transformers reads one of them and passes over the others without a word; here they must
agree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_ROPE_TYPES = ("default", "linear", "llama3")
_LONGEST = 80


def shown(value: Any) -> str:
    """A value in a sentence."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def told(config: Mapping[str, Any], *names: str) -> Any:
    """What ``config`` says of a fact that has several names; None where it says nothing.

    Raises ValueError when it says different things.
    """
    found = {name: config[name] for name in names if config.get(name) is not None}
    first = next(iter(found), None)
    for other, value in found.items():
        if first is not None and value != found[first]:
            raise ValueError(
                f"config.json says {first}={shown(found[first])} and {other}={shown(value)}, which are names of one "
                "fact: remove the wrong one."
            )
    return None if first is None else found[first]


def integer(config: Mapping[str, Any], key: str, least: int = 1) -> int:
    """Raises KeyError without the field, and ValueError when it is no whole number, or less than ``least``."""
    value = config[key]
    if type(value) is not int or value < least:
        raise ValueError(
            f"config.json sets {key}={shown(value)}, which must be a whole number, {least} or more: restore the file."
        )
    return value


def number(config: Mapping[str, Any], key: str) -> float:
    """Raises KeyError without the field, and ValueError when it is no positive number."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json sets {key}={shown(value)}, which must be a positive number: restore the file.")
    return float(value)


def flag(config: Mapping[str, Any], key: str) -> bool:
    """False where the field is missing or null. Raises ValueError when it is neither true nor false."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json sets {key}={shown(value)}, which must be true or false: restore the file.")
    return bool(value)


def heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """``num_attention_heads``, ``num_query_groups`` and ``kv_channels``, where queries may be more than keys."""
    number_of = integer(config, "num_attention_heads")
    groups = integer(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else number_of
    if number_of % groups:
        raise ValueError(
            f"config.json has num_attention_heads={number_of} beside num_key_value_heads={groups}, which must divide "
            "it: restore the file."
        )
    if config.get("head_dim") is not None:
        width = integer(config, "head_dim")
    else:
        width = head_width(config, "hidden_size", number_of)
    return {"num_attention_heads": number_of, "num_query_groups": groups, "kv_channels": width}


def head_width(config: Mapping[str, Any], key: str, number_of: int) -> int:
    """Of a head, where all of them share the model's width."""
    width = integer(config, key)
    if width % number_of:
        raise ValueError(
            f"config.json has {key}={width}, which its {number_of} attention heads cannot share: restore the file."
        )
    return width // number_of


def rope_parameters(config: Mapping[str, Any], default_theta: float = 10000.0) -> dict[str, Any]:
    """Rotary embedding as transformers 5 writes it (``rope_parameters``), also from the older fields ``rope_theta`` and
    ``rope_scaling``, of which transformers reads the latter first. Always has ``rope_type`` and ``rope_theta``; llama3
    has all of its factors.

    Raises:
        ValueError: the fields contradict each other, or ask for what megatron-core's table does not cover.
    """
    old, new = (_one_rope(config, name, default_theta) for name in ("rope_scaling", "rope_parameters"))
    if old and new and old != new:
        raise ValueError(
            f"config.json says rope_scaling={shown(config['rope_scaling'])} and "
            f"rope_parameters={shown(config['rope_parameters'])}, which are names of one fact: remove the wrong one."
        )
    return (
        old
        or new
        or _one_rope({**config, "rope_parameters": {"rope_type": "default"}}, "rope_parameters", default_theta)
    )


def _one_rope(config: Mapping[str, Any], name: str, default_theta: float) -> dict[str, Any]:
    """What one of the two fields means, by itself; empty where it says nothing."""
    said = config.get(name) or {}
    if not isinstance(said, dict):
        raise ValueError(f"config.json sets {name}={shown(said)}, which must be an object: restore the file.")
    if not said:
        return {}
    if nested := [key for key, value in said.items() if isinstance(value, dict)]:
        raise ValueError(f"config.json has {name} for each kind of layer ({nested[0]}), which is not supported.")
    rope = {key: value for key, value in said.items() if key not in ("type", "rope_type") and value is not None}
    rope = {"rope_type": told(said, "rope_type", "type") or "default", **rope}
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in rope and config.get(key) is not None and rope[key] != config[key]:
            raise ValueError(
                f"config.json says {key}={shown(config[key])} and, in its {name}, {key}={shown(rope[key])}: remove the "
                "wrong one."
            )
    outside = {"rope_theta": config.get("rope_theta")}
    rope["rope_theta"] = number({"rope_theta": default_theta, **_set(outside), **rope}, "rope_theta")
    if (part := rope.pop("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1):
        raise ValueError(f"config.json rotates a part of each head only ({shown(part)}), which is not supported.")
    if rope["rope_type"] not in _ROPE_TYPES:
        raise ValueError(
            f"config.json asks for rope_type={shown(rope['rope_type'])}, but only {_ROPE_TYPES} are supported."
        )
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for key in needed[rope["rope_type"]]:
        if key not in rope:
            raise ValueError(f"config.json asks for rope_type={rope['rope_type']!r} without its {key!r}.")
        number(rope, key)
    if rope["rope_type"] == "llama3":
        known = {"original_max_position_embeddings": 2048}
        for source in ({"original_max_position_embeddings": config.get("max_position_embeddings")}, config, rope):
            known |= _set({key: source.get(key) for key in known})
        rope |= {key: integer(known, key) for key in known}
    return rope


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
