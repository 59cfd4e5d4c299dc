"""Compared responses for reward models: read and tokenised once."""

from __future__ import annotations

import warnings
from typing import Any

from nemo_rlhf.data.files import Source
from nemo_rlhf.data.forms import TEXTS
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.records import margin_of
from nemo_rlhf.data.texts import scored_tokens
from nemo_rlhf.types import Pair


def read_pairs(source: Source, tokenizer: Any, max_sequence_length: int, *, intake: Intake | None = None) -> list[Pair]:
    """Pairs from a file, a directory, a hub or a sequence of records (``locate_records``), taken in by ``intake``.

    A record is of a form of ``data.forms``, which becomes ``{"prompt", "chosen", "rejected"}`` with responses as text
    (the prompt may be chat messages), or ``{"chosen", "rejected"}`` with two whole chats or texts, both with an
    optional "margin"; of ``{"text"}`` records, each odd one is better than the even one after it (NeMo-Aligner's
    form). Pairs with a text of more than ``max_sequence_length`` tokens are left out, and a warning says how many.

    Raises:
        ValueError: names the records that are none of these, whose two texts are equal, or whose margin is no number;
            or no pair is left.
    """
    pairs: list[Pair] = []
    num_long = num_all = 0
    intake = intake or Intake()
    for where, record in intake.records(source, "pairs"):
        with intake.noted():
            sides = [scored_tokens(where, _side(record, name), tokenizer) for name in ("chosen", "rejected")]
            if sides[0] == sides[1]:
                raise ValueError(f"{where}: chosen and rejected are the same text, of which neither can be better.")
            margin = margin_of(where, record.get("margin", 0.0))
            num_all += 1
            if max(map(len, sides)) > max_sequence_length:
                num_long += 1
                continue
            pairs.append(Pair(sides[0], sides[1], margin))
    if num_long:
        warnings.warn(
            f"Of {num_all} pairs, {num_long} are longer than data.max_sequence_length={max_sequence_length}, and left "
            "out.",
            stacklevel=2,
        )
    if not pairs:
        raise ValueError(f"No pair is left within data.max_sequence_length={max_sequence_length}: raise it.")
    return pairs


def _side(record: dict[str, Any], name: str) -> dict[str, Any]:
    """One side of a pair as a record of its own."""
    kept = {field: value for field, value in record.items() if field not in TEXTS}
    if record.get("prompt") is not None:
        return {**kept, "prompt": record["prompt"], "response": record[name]}
    return {**kept, "text" if isinstance(record[name], str) else "messages": record[name]}
