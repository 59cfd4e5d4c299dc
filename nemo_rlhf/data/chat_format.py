"""What a tokenizer's chat template writes around a turn, found by giving it a chat; and which tokens end a response."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_QUESTION, _ANSWER = "qzqz", "azaz"


@dataclass(frozen=True)
class ChatFormat:
    """The constant parts of a chat template.

    ``turn_end``: id of the token that closes an assistant's turn, None where it is closed by plain text. ``headers``:
    what stands in front of it, the longest first: with an answer, and with one that has thoughts. ``closing``: what the
    template writes once, behind the last turn.
    ``openings``: how a chat begins, behind BOS, which the template ``writes_bos`` or does not."""

    turn_end: int | None = None
    headers: tuple[str, ...] = ("",)
    closing: str = ""
    openings: tuple[str, ...] = ()
    writes_bos: bool = False


def chat_format(tokenizer: Any) -> ChatFormat:
    """The ``ChatFormat`` of a tokenizer's template; an empty one where there is no template, or none that takes a
    question and an answer."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ChatFormat()
    known = getattr(tokenizer, "_nemo_rlhf_chat_format", None)
    if known is None or known[0] != template:
        known = tokenizer._nemo_rlhf_chat_format = (template, _probe(tokenizer))
    return known[1]


def response_ends(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens of which any ends a response: EOS, those that ``generation_config.json`` names, and the one
    that closes the assistant's turn in the chat template."""
    ends = {tokenizer.eos_token_id, chat_format(tokenizer).turn_end, *getattr(tokenizer, "generation_eos_ids", ())}
    return frozenset(end for end in ends if end is not None)


def reply_end(tokenizer: Any, prompt: str | None) -> int:
    """Id of the token that a response to ``prompt``, or in a chat (None), is taught to end with: there, and behind a
    text that begins as a chat does, what closes a turn of the template; otherwise EOS."""
    turn_end = chat_format(tokenizer).turn_end
    is_chat = prompt is None or is_rendered(tokenizer, prompt)
    return turn_end if turn_end is not None and is_chat else tokenizer.eos_token_id


def is_rendered(tokenizer: Any, text: str) -> bool:
    """Whether a text begins as the tokenizer's chat template begins a chat."""
    return text.removeprefix(tokenizer.bos_token or "").startswith(chat_format(tokenizer).openings or "\0")


def takes_bos(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer's BOS belongs in front of a text: not where it is a chat of a template that has none."""
    return chat_format(tokenizer).writes_bos or not is_rendered(tokenizer, text)


def up_to_end(token_ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    """A response without what stands behind the first token that ends it."""
    end = next((index for index, token in enumerate(token_ids) if token in ends), len(token_ids))
    return list(token_ids[: end + 1])


def _probe(tokenizer: Any) -> ChatFormat:
    def render(*roles: str, prompts: bool = False, thoughts: str = "") -> str:
        contents = {"user": _QUESTION, "assistant": thoughts + _ANSWER, "system": _QUESTION}
        chat = [{"role": role, "content": contents[role]} for role in roles]
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompts)

    try:
        question, prompt = render("user"), render("user", prompts=True)
        chat, longer = render("user", "assistant"), render("user", "assistant", "user", "assistant")
        thought = render("user", "assistant", thoughts=f"<think>\n{_QUESTION}\n</think>\n\n")
    except Exception:  # a template raises what it likes; whoever renders a real chat is told
        return ChatFormat()
    if _ANSWER not in chat or _ANSWER not in thought:
        return ChatFormat()
    closing = chat[_whole_tokens(tokenizer, chat, _num_equal(chat, longer)) :]
    closing = "" if _ANSWER in closing else closing
    question = question.removesuffix(closing)
    headers = [prompt.removeprefix(question)]
    for answered in (chat, thought):
        written = answered[len(question) : answered.index(_ANSWER)] if answered.startswith(question) else ""
        headers.append(written[: _whole_tokens(tokenizer, written, _num_equal(headers[-1], written))])
    openings = {_opening(tokenizer, question)}
    with contextlib.suppress(Exception):  # many take no system message
        openings.add(_opening(tokenizer, render("system", "user")))
    turn_end = _first_special(tokenizer, chat[chat.rindex(_ANSWER) + len(_ANSWER) :])
    writes_bos = chat.startswith(tokenizer.bos_token or "\0")
    return ChatFormat(turn_end, tuple(headers[1:]), closing, tuple(one for one in sorted(openings) if one), writes_bos)


def _num_equal(a: str, b: str) -> int:
    """How many characters two texts have in common at their start."""
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _opening(tokenizer: Any, chat: str) -> str:
    """What stands in front of people's words in a chat, behind BOS; of that, where it begins with special tokens, the
    first word, because a template's own words may follow."""
    head = chat.removeprefix(tokenizer.bos_token or "")
    head = head[: head.find(_QUESTION)].strip()
    first = head.split(maxsplit=1)[0] if head else ""
    return first if any(token in first for token in tokenizer.all_special_tokens) else head


def _whole_tokens(tokenizer: Any, text: str, place: int) -> int:
    """``place``, or the start of the special token that it would cut in two."""
    for token in tokenizer.all_special_tokens:
        if (start := text.find(token, max(0, place - len(token) + 1), place + len(token) - 1)) >= 0:
            place = min(place, start)
    return place


def _first_special(tokenizer: Any, text: str) -> int | None:
    """The token that a text begins with behind blanks, if that is a special or an added one."""
    ids = tokenizer(text.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids = [token for token in ids if token in special or tokenizer.decode([token]).strip()]
    return ids[0] if ids and ids[0] in special else None
