"""Responses with a score, or that are to get one: read and tokenised as a reward model sees them."""

from __future__ import annotations

import warnings
from typing import Any

from nemo_rlhf.data.files import Source
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.prompts import encode_prompt
from nemo_rlhf.data.records import score_of
from nemo_rlhf.data.texts import encode_response, scored_tokens
from nemo_rlhf.types import ScoredText


def read_scores(
    source: Source, tokenizer: Any, max_sequence_length: int, *, intake: Intake | None = None
) -> list[ScoredText]:
    """Scored texts from a file, a directory, a hub or a sequence of records (``locate_records``), taken in by
    ``intake``.

    A record is of a form of ``data.forms``, which becomes ``{"prompt", "response"}`` (the prompt may be chat messages),
    ``{"messages"}`` or ``{"text"}``, with a number under "score" or "reward". Texts of more than
    ``max_sequence_length`` tokens are left out, and a warning says how many.

    Raises:
        ValueError: names the records that are none of these or whose score is no finite number; or no text is left.
    """
    texts: list[ScoredText] = []
    num_long = num_all = 0
    intake = intake or Intake()
    for where, record in intake.records(source, "scores"):
        with intake.noted():
            score = score_of(where, record)
            token_ids = scored_tokens(where, record, tokenizer)
            num_all += 1
            if len(token_ids) > max_sequence_length:
                num_long += 1
                continue
            texts.append(ScoredText(token_ids, score))
    if num_long:
        warnings.warn(
            f"Of {num_all} scored texts, {num_long} are longer than data.max_sequence_length={max_sequence_length}, "
            "and left out.",
            stacklevel=2,
        )
    if not texts:
        raise ValueError(f"No scored text is left within data.max_sequence_length={max_sequence_length}: raise it.")
    return texts


def encode_reply(prompt: str, response: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of ``prompt`` and ``response`` up to the token that ends it, as ``scored_tokens`` has those of
    ``{"prompt", "response"}``, and of the chat that a chat template made ``prompt`` of; here the response may be
    empty."""
    ids, _ = encode_prompt(prompt, tokenizer, "prompt")
    return (*ids, *encode_response(prompt, response, tokenizer))
