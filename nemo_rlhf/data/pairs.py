"""Compared responses for reward models: read and tokenised once."""

from __future__ import annotations

import math
import warnings
from typing import Any

from nemo_rlhf.data.records import Source, missing_field, read_records
from nemo_rlhf.data.texts import scored_tokens
from nemo_rlhf.types import Pair


def read_pairs(source: Source, tokenizer: Any, max_sequence_length: int) -> list[Pair]:
    """Pairs from a jsonl file, a ``datasets`` directory or a sequence of records.

    A record is ``{"prompt", "chosen", "rejected"}`` with responses as text (the prompt may be chat messages),
    ``{"chosen", "rejected"}`` with two whole chats, both with an optional "margin"; or half a pair, ``{"text"}``: then
    each odd line is better than the even one after it (NeMo-Aligner's form). Pairs with a text of more than
    ``max_sequence_length`` tokens are left out, and a warning says how many.

    Raises:
        ValueError: names the record that is none of these, whose two texts are equal, or whose margin is no number; or
            no pair is left.
    """
    pairs: list[Pair] = []
    num_long = num_all = 0
    halves: list[tuple[str, Any]] = []
    for where, record in read_records(source, "pair"):
        if not isinstance(record, dict):
            raise ValueError(
                f'{where} is a {type(record).__name__}, and must be an object with "chosen" and "rejected".'
            )
        if record.get("score") is not None and record.get("chosen") is None:
            raise ValueError(
                f"{where} is a scored response, and reward_model.loss=bradley_terry learns from compared ones: set "
                "reward_model.loss=regression."
            )
        if record.get("text") is not None and record.get("chosen") is None:
            halves.append((where, record))
            if len(halves) % 2:
                continue
            (_, better), record = halves[-2], {"chosen": None}
            sides = [scored_tokens(where, one, tokenizer) for one in (better, halves[-1][1])]
        else:
            sides = [scored_tokens(where, _side(where, record, name), tokenizer) for name in ("chosen", "rejected")]
        num_all += 1
        if sides[0] == sides[1]:
            raise ValueError(f"{where}: chosen and rejected are the same text, of which neither can be better.")
        if max(map(len, sides)) > max_sequence_length:
            num_long += 1
            continue
        pairs.append(Pair(sides[0], sides[1], _margin(where, record.get("margin", 0.0))))
    if len(halves) % 2:
        raise ValueError(
            f'{halves[-1][0]} is the last of an odd number of {{"text"}} lines: its rejected half is missing.'
        )
    if num_long:
        warnings.warn(
            f"Of {num_all} pairs, {num_long} are longer than data.max_sequence_length={max_sequence_length}, and left "
            "out.",
            stacklevel=2,
        )
    if not pairs:
        raise ValueError(f"No pair is left within data.max_sequence_length={max_sequence_length}: raise it.")
    return pairs


def _side(where: str, record: dict[str, Any], name: str) -> dict[str, Any]:
    if record.get(name) is None:
        raise missing_field(where, record, (name,))
    if record.get("prompt") is not None:
        return {**record, "response": record[name]}
    return {**record, "messages": record[name]}


def _margin(where: str, margin: Any) -> float:
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < math.inf:
        raise ValueError(f"{where}: the margin {margin!r} must be a number, 0 or more.")
    return float(margin)
