"""Prompts for rollouts: read, tokenised once, and handed out in an order that the step number alone decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nemo_rlhf.data.chats import read_chat
from nemo_rlhf.data.files import Source
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.records import missing_field
from nemo_rlhf.data.tokenizer import encode
from nemo_rlhf.data.turns import prompt_ids
from nemo_rlhf.types import Prompt

FIELDS = ("prompt", "text")


def read_prompts(
    source: Source, tokenizer: Any, max_prompt_length: int, *, intake: Intake | None = None
) -> list[Prompt]:
    """Prompts from a file, a directory, a hub or a sequence of records (``locate_records``), taken in by ``intake``.

    A record is a string, or of a form of ``data.forms``, which becomes an object with "prompt" (a string, or chat
    messages to which the tokenizer's chat template is applied) or "text"; every other field is kept in ``metadata``.
    ``max_prompt_length``: in tokens.
    Raises ValueError, which names the places, for records that are none of these, and prompts that are empty or too
    long.
    """
    prompts: list[Prompt] = []
    intake = intake or Intake()
    for where, record in intake.records(source, "prompts"):
        with intake.noted():
            prompts.append(_read_prompt(where, record, tokenizer, max_prompt_length))
    return prompts


def encode_prompt(prompt: Any, tokenizer: Any, where: str, record: Any = None) -> tuple[list[int], str]:
    """Token ids and text of a prompt: a string, or chat messages, whose text ends where the assistant goes on: behind
    the header of its turn, or, where the last message is its own, in the midst of that.

    A string gets what the tokenizer puts in front of a text (BOS); a chat template writes that itself. ``record``: as
    in ``read_chat``.
    """
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, start=True), prompt
    if isinstance(prompt, (list, tuple)):
        chat = read_chat(where, prompt, tokenizer, record)
        text = chat.prompt()
        return prompt_ids(chat, text), text
    raise ValueError(f"{where}: the prompt is a {type(prompt).__name__}, and must be text or a list of chat messages.")


def _read_prompt(where: str, record: Any, tokenizer: Any, max_prompt_length: int) -> Prompt:
    metadata: dict[str, Any] = {}
    prompt = record
    if isinstance(record, dict):
        field = next((name for name in FIELDS if record.get(name) is not None), None)
        if field is None:
            raise missing_field(where, record, FIELDS)
        metadata = {name: value for name, value in record.items() if name != field}
        prompt = record[field]
    elif not isinstance(record, str):
        raise ValueError(
            f'{where} is a {type(record).__name__}, and must be a string or an object with "prompt" or "text".'
        )
    if not prompt:
        raise ValueError(f"{where}: the prompt is empty.")
    token_ids, text = encode_prompt(prompt, tokenizer, where, metadata)
    if not token_ids:
        raise ValueError(f"{where}: the prompt has no token.")
    if len(token_ids) > max_prompt_length:
        raise ValueError(
            f"{where}: the prompt is {len(token_ids)} tokens long and data.max_prompt_length is {max_prompt_length}: "
            "raise the limit, or shorten or remove the prompt."
        )
    return Prompt(tuple(token_ids), text, metadata, None if isinstance(prompt, str) else tuple(prompt))


def share_fields(*groups: Sequence[Prompt]) -> list[list[Prompt]]:
    """The prompts with every field of any of them, None where a prompt had it not: a reward function then gets the same
    arguments whichever of them it is called for."""
    names = dict.fromkeys(name for group in groups for prompt in group for name in prompt.metadata)
    return [
        [replace(prompt, metadata={name: prompt.metadata.get(name) for name in names}) for prompt in group]
        for group in groups
    ]
