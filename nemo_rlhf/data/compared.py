"""Responses of which some are better than others, as pairs or as scored ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_rlhf.data.messages import Message, common_start, read_messages, reply_to, with_prompt
from nemo_rlhf.data.records import finite_reward

Record = dict[str, Any]


def compared(where: str, prompt: Any, chosen: Any, rejected: Any, purpose: str) -> Record:
    """A pair of replies to ``prompt`` (text, messages or None) as a record of the readers: a prompt with two texts
    where both replies are text, and otherwise two whole chats, or two whole texts. For prompts only what both have in
    common, up to where the assistant is to answer.

    Raises:
        ValueError: both are the same, or a side is no chat.
    """
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(side, (str, list, tuple)):
            raise ValueError(f"{where}: {name} is a {type(side).__name__}, and must be text or chat messages.")
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are the same text, of which neither can be better.")
    if not any(isinstance(side, (list, tuple)) for side in (chosen, rejected)):
        if purpose == "prompts":
            if not prompt:
                raise ValueError(f"{where} compares whole texts, which do not say where their prompt ends.")
            return {"prompt": prompt}
        sides = {"chosen": chosen, "rejected": rejected}
        return sides if prompt in (None, "") else {"prompt": prompt, **sides}
    better, worse = _whole(f"{where}: chosen", prompt, chosen), _whole(f"{where}: rejected", prompt, rejected)
    if better == worse:
        raise ValueError(f"{where}: chosen and rejected are the same text, of which neither can be better.")
    shared = common_start(better, worse)
    if purpose == "prompts":
        while shared and better[shared - 1]["role"] == "assistant":
            shared -= 1
        if not shared:
            raise ValueError(f"{where}: chosen and rejected do not begin with the same message, so have no prompt.")
        return {"prompt": better[:shared]}
    return {"chosen": better, "rejected": worse}


def _whole(where: str, prompt: Any, side: Any) -> list[Message]:
    messages = [{"role": "assistant", "content": side}] if isinstance(side, str) else read_messages(where, side)
    start, reply = with_prompt(where, prompt, messages)
    return [*start, *reply]


def ranked(
    where: str, prompt: Any, scored: Sequence[tuple[Any, Any]], purpose: str, field: str
) -> list[tuple[str, Record]]:
    """Replies with scores, the higher the better: for pairs each better one with each worse one, otherwise one by one.

    Raises:
        ValueError: a score is no finite number, or no reply is better than another.
    """
    if purpose == "prompts":
        return [("", {"prompt": prompt})]
    scores = [finite_reward(f"{where}, completion {i}, {field}", score) for i, (score, _) in enumerate(scored)]
    replies = [reply for _, reply in scored]
    if purpose != "pairs":
        return [
            (f", completion {i}", {**reply_to(f"{where}, completion {i}", prompt, reply), "reward": score})
            for i, (score, reply) in enumerate(zip(scores, replies, strict=True))
        ]
    found = [(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]]
    if not found:
        raise ValueError(f"{where} has {len(scores)} completions of the same {field}, of which none is better.")
    return [
        (place, compared(where + place, prompt, replies[i], replies[j], purpose))
        for i, j in found
        for place in [f", completions {i} and {j}"]
    ]


def split_dialogue(chosen: str, rejected: str, marker: str) -> tuple[str, str, str]:
    """What two dialogues in text have in common up to the last ``marker``, and how each of them goes on."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    end = chosen[: min(len(chosen), len(rejected)) if shared is None else shared].rfind(marker)
    end = 0 if end < 0 else end + len(marker)
    return chosen[:end], chosen[end:], rejected[end:]
