"""The assistant's turns in a chat: which tokens it generated, and so learns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from nemo_rlhf.data.chat_format import chat_format, response_ends, up_to_end
from nemo_rlhf.data.chats import Chat, dated
from nemo_rlhf.data.tokenizer import encode
from nemo_rlhf.data.training_templates import training_template

Piece = tuple[list[int], bool]  # token ids and whether they are learned
Span = tuple[int, int]  # where a turn begins and ends, in characters

# Templates mark the assistant's tokens with {% generation %} ... {% endgeneration %}, if they mark them at all.
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STRETCH = 16  # messages


def chat_pieces(chat: Chat) -> list[Piece]:
    """A chat's pieces, every turn of the assistant one that is learned, up to the token that ends it; those of messages
    with "weight": 0 are not. What the template writes behind the last turn's end is left out.

    Raises:
        ValueError: there is no such turn, or the template writes earlier turns differently when more follow.
    """
    keeping = training_template(chat.tokenizer.get_chat_template(tools=chat.tools))
    chat = chat if keeping is None else replace(chat, template=dated(keeping, chat.tokenizer))
    weights = [message.get("weight") for message in chat.messages if message["role"] == "assistant"]
    if all(weight == 0 for weight in weights):
        raise ValueError(f"{chat.where} have no turn of the assistant to learn.")
    is_last_alone = len(weights) > 1 and all(weight == 0 for weight in weights[:-1])
    if is_last_alone and chat.messages[-1]["role"] == "assistant":
        return last_turn(chat)  # which any template shows
    whole = chat.whole()
    is_marked = GENERATION_MARK.search(chat.template) is not None
    spans = _marked_spans(chat) if is_marked else find_spans(chat, whole)
    if spans is None:
        raise ValueError(
            f"{chat.where}: the chat template writes messages differently when more follow, so the assistant's tokens "
            "cannot be told apart: mark them with {% generation %} in a template of your own (data.chat_template), or "
            "give prompt and response."
        )
    if len(spans) < len(weights):
        raise ValueError(
            f"{chat.where}: the chat template marks {len(spans)} of the assistant's {len(weights)} turns with "
            "{% generation %}: mark all that it writes of them."
        )
    pieces = _encode_spans(chat, whole, spans)
    if chat.messages[-1]["role"] == "assistant":
        pieces.pop()
    if 0 in weights:
        if len(spans) != len(weights):
            raise ValueError(f'{chat.where}: "weight" needs a template that marks each turn of the assistant once.')
        for index, weight in enumerate(weights):
            pieces[2 * index + 1] = (pieces[2 * index + 1][0], weight != 0)
    return pieces


def last_turn(chat: Chat) -> list[Piece]:
    """A chat as a prompt and the response to it, which its last message is, up to the token that ends it.

    Raises:
        ValueError: the last message is not the assistant's.
    """
    if chat.messages[-1]["role"] != "assistant" or len(chat.messages) < 2:
        raise ValueError(f"{chat.where} must end in a turn of the assistant, behind what it answers.")
    whole = chat.whole()
    start = _start(chat, chat.messages[:-1], whole)
    if start is None:  # the template writes earlier messages differently when more follow
        said = (chat.messages[-1].get("content") or "").strip()
        marks = [header for header in chat_format(chat.tokenizer).headers if header and header in whole]
        if marks:
            start = whole.rfind(marks[0]) + len(marks[0])
        elif said and said in whole:
            start = whole.rfind(said)
        else:
            raise ValueError(f"{chat.where}: the chat template does not show where the last turn begins.")
    return _encode_spans(chat, whole, [(start, len(whole))])[:2]


def prompt_ids(chat: Chat, text: str) -> list[int]:
    """Token ids of a chat's ``prompt()``. Earlier turns of the assistant are tokenised by themselves, as they are in
    ``chat_pieces``, and as they were when they were sampled."""
    before = chat.messages[:-1]
    spans = find_spans(chat, text) if any(message["role"] == "assistant" for message in before) else None
    if spans and chat.messages[-1]["role"] == "assistant":
        spans.pop()
    return [token for ids, _ in _encode_spans(chat, text, spans or []) for token in ids]


def find_spans(chat: Chat, whole: str) -> list[Span] | None:
    """Where the assistant's turns are in ``whole``, the text of a chat; None where its template writes messages
    differently when more follow.

    A turn is what the chat gains by it, behind the header that a rollout begins with. Turns are looked for in stretches
    of the chat, each behind its first messages: rendering all that precedes every turn would take time that grows with
    the square of the chat's length.
    """
    messages, closing = chat.messages, chat_format(chat.tokenizer).closing
    spans: list[Span] = []
    place = 0  # where the stretch begins
    for first, end in _stretches(messages):
        context = messages[: _head(messages)] if first else ()
        skipped = len(chat.render(context).removesuffix(closing)) if context else 0
        for index in range(first, end):
            if messages[index]["role"] != "assistant":
                continue
            start = _start(chat, (*context, *messages[first:index]), whole, place, skipped)
            stop: int | None = len(whole)
            if index + 1 < len(messages):
                gained = chat.render((*context, *messages[first : index + 1])).removesuffix(closing)[skipped:]
                stop = place + len(gained) if whole.startswith(gained, place) else None
            if start is None or stop is None or start > stop:
                return None
            spans.append((start, stop))
        place = spans[-1][1] if spans else 0
    return spans


def _start(chat: Chat, before: Sequence[Any], whole: str, place: int = 0, skipped: int = 0) -> int | None:
    """Where the assistant's turn begins behind the messages ``before``, whose text without its first ``skipped``
    characters stands at ``place``."""
    headers = [header for header in chat_format(chat.tokenizer).headers if header]
    if not before:
        return next((whole.find(header) + len(header) for header in headers if header in whole), None)
    closed = chat.render(before).removesuffix(chat_format(chat.tokenizer).closing)[skipped:]
    # Some templates open a rollout's turn with more than a turn of the chat has (<think>).
    for text in (chat.render(before, prompts=True)[skipped:], *(closed + header for header in headers)):
        if whole.startswith(text, place):
            return place + len(text)
    return None


def _head(messages: Sequence[Any]) -> int:
    """How many messages there are up to the assistant's first."""
    return next(index for index, message in enumerate(messages, start=1) if message["role"] == "assistant")


def _stretches(messages: Sequence[Any]) -> Iterator[Span]:
    """(first, end) of stretches of messages; each ends in a turn of the assistant, or is the last."""
    first = 0
    for index, message in enumerate(messages):
        is_last = index + 1 == len(messages)
        if is_last or (message["role"] == "assistant" and index + 1 - first >= _STRETCH):
            yield first, index + 1
            first = index + 1


def _marked_spans(chat: Chat) -> list[Span]:
    """Where the template's marks say that the assistant speaks, in characters.

    apply_chat_template(return_assistant_tokens_mask=True) has these too, but its mask is wrong where a stretch begins
    or ends in a blank that belongs to no token.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # annotated there as str
        [list(chat.messages)],
        tools=None if chat.tools is None else list(chat.tools),
        chat_template=chat.template,
        return_assistant_tokens_mask=True,
        **{**chat.tokenizer.special_tokens_map, **chat.variables},
    )
    _, spans_of_chats = rendered
    return spans_of_chats[0]


def _encode_spans(chat: Chat, text: str, spans: Sequence[Span]) -> list[Piece]:
    """What lies between spans and the spans in turn, each span up to the token that ends it, which may be the next one
    behind it; what is left behind the last stands at the end."""
    ends = response_ends(chat.tokenizer)
    borders = [0, *(place for span in spans for place in span), len(text)]
    pieces = [
        (encode(chat.tokenizer, text[start:end], start=False), bool(index % 2))
        for index, (start, end) in enumerate(pairwise(borders))
    ]
    for index in range(1, len(pieces), 2):
        turn, behind = pieces[index][0], pieces[index + 1][0]
        response = up_to_end(turn, ends)
        behind[:0] = turn[len(response) :]
        if behind and not (response and response[-1] in ends) and behind[0] in ends:
            response.append(behind.pop(0))
        pieces[index] = (response, True)
    return pieces
