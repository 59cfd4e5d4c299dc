"""Chat messages as people have them, made into what a chat template takes, and rendered by it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rlhf.data.chat_format import response_ends
from nemo_rlhf.data.messages import ROLES
from nemo_rlhf.data.records import missing_field

# What models think before they answer; a template reads it under one of these names.
_REASONING = ("reasoning_content", "reasoning", "thinking")
# A template that takes a tool call's arguments for an object.
_READS_OBJECTS = re.compile(r"arguments['\"\]]*\s*\|\s*(tojson|items)")
# How a template asks for the date: with the format in quotes.
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# Arguments of apply_chat_template that are not the template's.
_RESERVED = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "messages"),
    *("max_length", "padding", "truncation", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
    *("tokenize", "tokenizer_kwargs", "tools"),
}


@dataclass(frozen=True)
class Chat:
    """Messages, tools and variables for a chat template of ``tokenizer``; ``where`` begins error messages."""

    where: str
    messages: tuple[dict[str, Any], ...]
    tokenizer: Any
    tools: tuple[Any, ...] | None
    variables: Mapping[str, Any]
    template: str

    def render(self, messages: Sequence[Mapping[str, Any]], *, prompts: bool = False, continues: bool = False) -> str:
        """The text of ``messages``, some of the chat's own.

        Args:
            prompts: with the header of the assistant's next turn behind them.
            continues: without what closes the last of them, which is the assistant's and goes on.

        Raises:
            ValueError: the template does not take them.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=None if self.tools is None else list(self.tools),
                chat_template=self.template,
                add_generation_prompt=prompts,
                continue_final_message=continues,
                tokenize=False,
                **self.variables,
            )
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.where}: the tokenizer's chat template does not take these messages ({reason})."
            ) from error
        return str(text)

    def prompt(self) -> str:
        """The chat up to where the assistant goes on: in a turn of its own, or in the one that comes last."""
        is_prefill = self.messages[-1]["role"] == "assistant"
        return self.check_written(self.render(self.messages, prompts=not is_prefill, continues=is_prefill))

    def whole(self) -> str:
        """The text of all messages."""
        return self.check_written(self.render(self.messages))

    def check_written(self, text: str) -> str:
        """``text``, which the template has made of the messages. Raises ValueError where it has left out what somebody
        said to the assistant: many know three roles, and pass over others without a word."""
        place = 0
        for index, message in enumerate(self.messages):
            said = (message.get("content") or "").strip()
            if message["role"] == "assistant" or not said:
                continue
            forms = (said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1])
            found = next((at for one in forms if (at := text.find(one, place)) >= 0), None)
            if found is None and not any(one in text for one in forms):
                raise ValueError(
                    f"{self.where}: the tokenizer's chat template does not write message {index}, of the "
                    f"{message['role']}: give it a role that the template knows, or leave it out."
                )
            place = found or place
        return text


def read_chat(where: str, messages: Any, tokenizer: Any, record: Any = None) -> Chat:
    """A ``Chat`` of people's messages: {"role", "content"} each, where content is text, a list of text parts, or null
    beside tool calls.

    Args:
        record: where it is an object, its "tools" and "chat_template_kwargs" go to the template, too.

    Raises:
        ValueError: begins with ``where``; there is no template, or something that it would not write, or would write
            as something else.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{where} is a list of chat messages, and the tokenizer has no chat template: give text, use a tokenizer "
            'with "chat_template", or name a file with one in data.chat_template.'
        )
    if not isinstance(messages, (list, tuple)) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f'{where} is not a list of chat messages: each must be an object with "role" and "content".')
    fields = record if isinstance(record, Mapping) else {}
    tools = _tools(where, fields.get("tools"))
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    if tools is not None and not mentions(template, "tools"):
        raise ValueError(f'{where} has "tools", which the tokenizer\'s chat template does not write: leave them out.')
    variables = {**getattr(tokenizer, "chat_template_kwargs", {}), **_variables(where, fields, template)}
    ends = [tokenizer.decode([end]) for end in response_ends(tokenizer)]
    clean = tuple(_message(f"{where}: message {index}", one, template, ends) for index, one in enumerate(messages))
    return Chat(where, clean, tokenizer, tools, variables, dated(template, tokenizer))


def dated(template: str, tokenizer: Any) -> str:
    """A template that writes the day of the run, ``tokenizer.chat_date``, where it would write today: a run that goes
    on tomorrow, or on a node in another time zone, learns from the same texts."""
    day = getattr(tokenizer, "chat_date", None)
    return template if day is None else _TODAY.sub(lambda call: json.dumps(day.strftime(call[2])), template)


def is_empty(message: Mapping[str, Any]) -> bool:
    """Whether a turn says nothing: no text, no tool call and no thought. A system message may say nothing."""
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) and "text" in part else part for part in parts]
    says_nothing = all(text is None or (isinstance(text, str) and not text.strip()) for text in texts)
    acts = message.get("tool_calls") or message.get("function_call") or _thoughts(message)
    return says_nothing and not acts and message.get("role") != "system"


def check_end(where: str, response: str, ends: Sequence[str]) -> None:
    """Raises ValueError where a response goes on behind the name of a token that ends it: what stands there would be
    neither learned nor scored."""
    for end in ends:
        if response.partition(end)[2].strip():
            raise ValueError(
                f"{where}: the response goes on behind {end}, which ends a response: leave that name out, or what "
                "stands behind it."
            )


def _reads(template: str, name: str) -> bool:
    """Whether a template reads a field ``name`` of a message."""
    quoted = rf"""['"]{name}['"]"""
    return re.search(rf"\.{name}\b|\[{quoted}\]|\({quoted}|{quoted}\s+(not\s+)?in\b", template) is not None


def mentions(template: str, name: str) -> bool:
    """Whether a template has ``name`` among its words."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def check_variables(where: str, variables: Any, template: str) -> None:
    """Raises ValueError where ``variables`` is no mapping of names that the template reads."""
    if not isinstance(variables, Mapping):
        raise ValueError(f"{where} is a {type(variables).__name__}, and must be an object of the template's variables.")
    for name in variables:
        if name in _RESERVED:
            raise ValueError(f'{where}: "{name}" is no variable of a chat template: leave it out.')
        if not mentions(template, str(name)):
            raise ValueError(f'{where}: the chat template has no variable "{name}": check its name, or leave it out.')


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str)


def _tools(where: str, tools: Any) -> tuple[Any, ...] | None:
    if isinstance(tools, str):  # as columns of text hold them
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError(f'{where}: "tools" is text that is not JSON: give a list of tools.') from None
    if not tools:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f'{where}: "tools" must be a list of objects, each the description of one tool.')
    return tuple(tools)


def _variables(where: str, record: Mapping[str, Any], template: str) -> Mapping[str, Any]:
    variables = record.get("chat_template_kwargs")
    if variables is None:
        return {}
    check_variables(f'{where}: "chat_template_kwargs"', variables, template)
    return variables


def _message(where: str, message: Mapping[str, Any], template: str, ends: Sequence[str]) -> dict[str, Any]:
    clean = {name: value for name, value in message.items() if value is not None}
    if not mentions(template, message["role"]):  # one that writes any role, or that knows it by another name
        clean["role"] = ROLES.get(message["role"].lower(), message["role"])
    if clean.get("weight") not in (None, 0, 1):
        raise ValueError(f"{where} has the weight {clean['weight']!r}: give 1, or 0 where it is not to be learned.")
    calls = clean.get("tool_calls") or clean.get("function_call")
    for name in ("tool_calls", "function_call"):
        if clean.get(name) and not _reads(template, name):
            raise ValueError(f'{where} has "{name}", which the tokenizer\'s chat template does not write.')
    if calls and "tool_calls" in clean:
        clean["tool_calls"] = [_call(where, call, template) for call in clean["tool_calls"]]
    _name_thoughts(where, clean, template)
    if "content" not in message and not calls:
        raise missing_field(where, message, ("content",))
    content = _content(where, message.get("content"))
    if is_empty(message):
        raise ValueError(
            f"{where}, of the {message['role']}, is empty: give it text, or set data.empty_turns=drop to leave such "
            "turns out."
        )
    if clean["role"] == "assistant":
        check_end(where, content, ends)
    if content or "content" in clean or not calls:
        clean["content"] = content
    else:
        clean["content"] = None  # templates ask for it: some write it as a text
    return clean


def _content(where: str, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f'{where}: "content" is a {type(content).__name__}, and must be text, or a list of parts.')
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise ValueError(f'{where} has a part of type "{kind}", and only text can be read here: leave it out.')
        if not isinstance(text, str):
            raise ValueError(f'{where} has a part without text: each must be {{"type": "text", "text": ...}}.')
        texts.append(text)
    return "".join(texts)


def _call(where: str, call: Any, template: str) -> dict[str, Any]:
    """A tool call with its arguments as the template writes them: an object, or JSON text. Data has either."""
    if not isinstance(call, Mapping):
        raise ValueError(f'{where}: "tool_calls" must be a list of objects.')
    clean = dict(call)
    if isinstance(call.get("function"), Mapping):
        clean["function"] = _call(where, call["function"], template)
    arguments = call.get("arguments")
    if not _READS_OBJECTS.search(template):
        if isinstance(arguments, Mapping):
            clean["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # otherwise the model writes it as it stands
            clean["arguments"] = json.loads(arguments)
    return clean


def _name_thoughts(where: str, message: dict[str, Any], template: str) -> None:
    """Put a message's thoughts under the name that the template reads."""
    found = _thoughts(message)
    if not found:
        return
    wanted = next((name for name in (*found, *_REASONING) if _reads(template, name)), None)
    if wanted is None:
        raise ValueError(
            f'{where} has "{found[0]}", which the tokenizer\'s chat template does not write: put it into "content" as '
            "the model writes it, or leave it out."
        )
    message[wanted] = message.pop(found[0])


def _thoughts(message: Mapping[str, Any]) -> list[str]:
    return [name for name in _REASONING if isinstance(message.get(name), str) and message[name].strip()]
