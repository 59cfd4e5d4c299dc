"""Chat messages of whatever form, as ``[{"role", "content", ...}]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rlhf.untrusted import parse_json

Message = dict[str, Any]

# What ShareGPT's "from" and others call those who speak.
ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model", "chatbot", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}


def read_messages(where: str, value: Any) -> list[Message]:
    """``value`` as messages: a list of objects with "role" and "content", or with "from" and "value" (ShareGPT). What
    is not understood is left to whoever renders them. Raises ValueError, which begins with ``where``, for a list that
    is none, and for a speaker that is unknown."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(f'{where} is not a list of chat messages: each must be an object with "role" and "content".')
    return [_message(where, index, one) for index, one in enumerate(value)]


def _message(where: str, index: int, given: Mapping[str, Any]) -> Message:
    if given.get("role") is None and given.get("from") is not None:
        return _shared(f"{where}, message {index}", given)
    if not isinstance(given.get("role"), str):
        raise ValueError(
            f'{where} is not a list of chat messages: message {index} has no "role", and each must be an object with '
            '"role" and "content".'
        )
    return dict(given)


def _shared(where: str, given: Mapping[str, Any]) -> Message:
    speaker, value = given["from"], given.get("value")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{where} is from {speaker!r}, which is none of {', '.join(ROLES)}.")
    if given.get("label") is not None:
        raise ValueError(f'{where} has a "label" (SteerLM\'s attributes), which a chat template does not write.')
    if speaker.lower() == "function_call":
        found = parse_json(value, f"{where}: the function call") if isinstance(value, str) else value
        calls = [{"type": "function", "function": call} for call in (found if isinstance(found, list) else [found])]
        return {"role": role, "content": None, "tool_calls": calls}
    return {"role": role, "content": value}


def with_prompt(where: str, prompt: Any, reply: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The messages before a reply, and those of the reply. A prompt that is text is the user's message; a reply may
    repeat its prompt (as UltraFeedback's do)."""
    if prompt in (None, "", [], ()):
        return [], list(reply)
    if not isinstance(prompt, (str, list, tuple)):
        raise ValueError(f"{where}: the prompt is a {type(prompt).__name__}, and must be text or chat messages.")
    if isinstance(prompt, str):
        asked = [index for index, message in enumerate(reply[:2]) if _says(message, "user", prompt)]
        if asked and all(message["role"] == "system" for message in reply[: asked[0]]):
            return list(reply[: asked[0] + 1]), list(reply[asked[0] + 1 :])
        return [{"role": "user", "content": prompt}], list(reply)
    start = read_messages(f"{where}: the prompt", prompt)
    if list(reply[: len(start)]) == start:
        return start, list(reply[len(start) :])
    return start, list(reply)


def _says(message: Message, role: str, content: str) -> bool:
    said = message.get("content")
    if isinstance(said, (list, tuple)) and all(isinstance(part, Mapping) for part in said):
        said = "".join(str(part.get("text")) for part in said)
    return message["role"] == role and said == content


def reply_to(where: str, prompt: Any, reply: Any) -> dict[str, Any]:
    """``{"prompt", "response"}`` of a reply in text, and ``{"messages"}`` of one in messages, which the chat template
    writes as it writes any chat; what the assistant said before has the weight 0: it is not learned."""
    if not isinstance(reply, (list, tuple)):
        return {"prompt": prompt, "response": reply}
    start, turns = with_prompt(where, prompt, read_messages(f"{where}: the response", reply))
    before = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in start]
    return {"messages": [*before, *turns]}


def common_start(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages both chats begin with."""
    number = 0
    while number < min(len(first), len(second)) and first[number] == second[number]:
        number += 1
    return number


def without_nulls(value: Any) -> Any:
    """``value`` without the nulls that Arrow adds to objects of one list; a message's content may be null by itself."""
    if isinstance(value, Mapping):
        kept = "content" if value.get("role") is not None else None
        return {name: without_nulls(one) for name, one in value.items() if one is not None or name == kept}
    if isinstance(value, (list, tuple)):
        return [without_nulls(one) for one in value]
    return value
