"""Responses with a score, or that are to get one: read and tokenised as a reward model sees them."""

from __future__ import annotations

import warnings
from typing import Any

from nemo_rlhf.data.prompts import encode_prompt
from nemo_rlhf.data.records import Source, finite_reward, missing_field, read_records
from nemo_rlhf.data.texts import encode_response, scored_tokens
from nemo_rlhf.types import ScoredText

FIELDS = ("score", "reward")


def read_scores(source: Source, tokenizer: Any, max_sequence_length: int) -> list[ScoredText]:
    """Scored texts from a jsonl file, a ``datasets`` directory or a sequence of records.

    A record is ``{"prompt", "response"}`` (the prompt may be chat messages), ``{"messages"}`` or ``{"text"}``, with a
    number under "score" or "reward". Texts of more than ``max_sequence_length`` tokens are left out, and a warning says
    how many.

    Raises:
        ValueError: names the record that is none of these or whose score is no finite number; or no text is left.
    """
    texts: list[ScoredText] = []
    num_long = num_all = 0
    for where, record in read_records(source, "scored text"):
        if not isinstance(record, dict):
            raise ValueError(f'{where} is a {type(record).__name__}, and must be an object with "score".')
        score = _score(where, record)
        num_all += 1
        token_ids = scored_tokens(where, record, tokenizer)
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


def _score(where: str, record: dict[str, Any]) -> float:
    found = [name for name in FIELDS if record.get(name) is not None]
    if not found and record.get("chosen") is not None:
        raise ValueError(
            f"{where} compares two responses, and reward_model.loss=regression learns from scores: give one response "
            'and its "score", or set reward_model.loss=bradley_terry.'
        )
    if not found:
        raise missing_field(where, record, FIELDS)
    if len(found) > 1:
        raise ValueError(f'{where} has both "score" and "reward": give one of them.')
    return finite_reward(where, record[found[0]])
