"""Chat messages of whatever form, as ``[{"role", "content", ...}]``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rlhf.untrusted import parse_json

Message = dict[str, Any]

# What ShareGPT's "from" and its kin call those who speak.
ROLES = {
    **dict.fromkeys(("human", "user", "prompter", "customer"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "claude", "model", "chatbot", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}
_PLAIN = {"role", "content", "weight", "name"}


def read_messages(where: str, value: Any) -> list[Message]:
    """``value`` as messages: a list of objects with "role" and "content", or with "from" and "value" (ShareGPT). What
    is not understood is left to whoever renders them. Raises ValueError, which begins with ``where``, for a list that
    is none, and for a speaker or a tool call that is unknown."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(one, Mapping) for one in value):
        raise ValueError(f'{where} is not a list of chat messages: each must be an object with "role" and "content".')
    return [_message(where, index, one) for index, one in enumerate(value)]


def _message(where: str, index: int, given: Mapping[str, Any]) -> Message:
    if given.get("role") is None and given.get("from") is not None:
        return _shared(f"{where}, message {index}", given)
    if not isinstance(given.get("role"), str):
        raise ValueError(f'{where} is not a list of chat messages: message {index} has no "role".')
    message = dict(given)
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _tool_calls(f"{where}, message {index}", message["tool_calls"])
    return message


def _shared(where: str, given: Mapping[str, Any]) -> Message:
    speaker, value = given["from"], given.get("value")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{where} is from {speaker!r}, which is none of {', '.join(ROLES)}.")
    if given.get("label") is not None:
        raise ValueError(f'{where} has a "label" (SteerLM\'s attributes), which a chat template does not write.')
    if speaker.lower() == "function_call":
        call = parse_json(value, f"{where}: the function call") if isinstance(value, str) else value
        return {
            "role": role,
            "content": None,
            "tool_calls": _tool_calls(where, call if isinstance(call, list) else [call]),
        }
    return {"role": role, "content": value}


def _tool_calls(where: str, calls: Any) -> list[Any]:
    """Tool calls with objects as arguments: OpenAI has them as JSON in a string, and templates write what they get."""
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f'{where}: "tool_calls" must be a list of objects.')
    result = []
    for call in calls:
        call = dict(call) if "function" in call else {"type": "function", "function": dict(call)}
        if isinstance(call["function"], Mapping) and isinstance(call["function"].get("arguments"), str):
            arguments = parse_json(call["function"]["arguments"], f"{where}: what a tool is called with")
            call["function"] = {**call["function"], "arguments": arguments}
        result.append(call)
    return result


def read_tools(where: str, tools: Any) -> Any:
    """Tools as a list of objects: data sets have them as JSON in a string, too."""
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: tools") if tools.strip() else []
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"{where}: tools must be a list of objects.")
    return list(tools)


def plain_text(messages: Sequence[Message]) -> str | None:
    """The text of a reply that is one message of the assistant and nothing but text; otherwise None."""
    if len(messages) != 1:
        return None
    (message,) = messages
    extra = [name for name, value in message.items() if name not in _PLAIN and value not in (None, [], "")]
    content = message.get("content")
    if isinstance(content, (list, tuple)) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        content = "".join(part["text"] for part in content)
    return content if message["role"] == "assistant" and not extra and isinstance(content, str) else None


def with_prompt(where: str, prompt: Any, reply: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The messages before a reply, and those of the reply. A prompt that is text is the user's message; a reply may
    repeat its prompt (as UltraFeedback's do)."""
    if prompt in (None, "") or len(prompt) == 0:
        return [], list(reply)
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
    return message["role"] == role and message.get("content") == content


def reply_to(where: str, prompt: Any, reply: Any) -> dict[str, Any]:
    """``{"prompt", "response"}`` of a reply in text or in messages; or ``{"messages"}`` of one that is more than a
    text, which is then the assistant's only part of the chat. Raises ValueError where it is not."""
    if not isinstance(reply, (list, tuple)):
        return {"prompt": prompt, "response": reply}
    start, turns = with_prompt(where, prompt, read_messages(f"{where}: the response", reply))
    text = plain_text(turns)
    if text is not None and start:
        return {"prompt": start, "response": text}
    if any(message["role"] == "assistant" for message in start):
        raise ValueError(
            f"{where}: the response is more than one message in text, and the prompt has turns of the assistant, which "
            "are not to be learned: give each turn a record of its own."
        )
    return {"messages": [*start, *turns]}


def only_last_is_learned(where: str, messages: Sequence[Message]) -> bool:
    """Whether OpenAI's weights (0: not learned) leave only the last message to learn. Raises ValueError where they
    choose otherwise among the assistant's."""
    said = [message for message in messages if message["role"] == "assistant"]
    weights = [1 if message.get("weight") is None else message["weight"] for message in said]
    if all(weight == 1 for weight in weights):
        return False
    if messages[-1] is said[-1] and weights[-1] == 1 and not any(weights[:-1]):
        return True
    raise ValueError(
        f"{where}: of the weights of the assistant's messages only those can be used that learn all of them or the "
        "last one alone: give prompt and response."
    )


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
