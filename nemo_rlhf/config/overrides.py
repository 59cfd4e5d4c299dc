"""Overrides, ``key=value`` in Hydra's grammar, each as a small layer of configuration.

Where the key is text, the grammar decides as little as it can: what is no list, mapping or function of Hydra's is taken
as it was written, whatever characters it has.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from antlr4 import CommonTokenStream, InputStream
from hydra.core.override_parser.overrides_parser import create_functions
from hydra.core.override_parser.overrides_visitor import HydraErrorListener, HydraOverrideVisitor
from hydra.core.override_parser.types import Override, OverrideType, QuotedString, ValueType
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer
from hydra.grammar.gen.OverrideParser import OverrideParser

from nemo_rlhf.config.keys import expected, nearest_key
from nemo_rlhf.config.scalars import Scalar, is_text

COMMAND_LINE = "from the command line"
_KEY = re.compile(r"(\+\+?)?([\w-]+(\.[\w-]+)*)", re.ASCII)
_ESCAPE = re.compile(r"\\[\\()\[\]{}:=, \t]")
_CALL = re.compile(r"\s*\w+\(.*\)\s*", re.DOTALL)


def read_override(text: str, keys: Mapping[str, Any]) -> tuple[str, Any]:
    """The dotted key and the value of an override, whose scalars are ``Scalar``.

    Raises:
        ValueError: it is none, its key does not exist, or it holds more than one value.
    """
    key, equals, written = text.partition("=")
    known = _KEY.fullmatch(key)
    if equals and known is not None:
        key = known[2]
        if not exists(key, keys) and not is_section(key, keys):
            raise unknown_key(key, keys, COMMAND_LINE)
        if is_text(_hint(key, keys)):
            return key, _text_value(key, written)
    try:
        override = _parse(text)
    except HydraException as error:
        if not equals:
            raise ValueError(f"{text!r} does not set anything: write key=value.") from None
        reason = str(error).splitlines()[0].strip()
        raise ValueError(f"{text!r} is not a Hydra override ({reason}): {_advice(key, keys)}.") from None
    key = override.get_key_element().lstrip("+~")
    if override.type == OverrideType.DEL:
        raise ValueError(f"{text!r} would remove a key, which cannot be: set {key} to null or to its default.")
    if override.is_sweep_override():
        raise ValueError(f"{text!r} holds more than one value: write a list as {key}=[a,b], one run takes no other.")
    if not exists(key, keys) and not is_section(key, keys):
        raise unknown_key(key, keys, COMMAND_LINE)
    return key, override.value()


def quoted(value: str) -> str:
    """Any text as a value of Hydra's override grammar: ``f"model.restore_from={quoted(path)}"``."""
    # There a backslash is itself, unless it stands before a quote or at the end.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", literal(value)).replace("'", r"\'")
    return f"'{escaped}'"


def literal(value: str) -> str:
    """``value`` in a form that OmegaConf takes for these very characters, where it holds what begins an
    interpolation."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if "${" in value else value


def bash_form(key: str, value: str) -> str:
    """The override as it is typed in a shell, for a value of any characters."""
    escaped = re.sub(r'(\\+)(?="|$)', r"\1\1", value).replace('"', r"\"")
    word = f'"{escaped}"'
    if word.isprintable():
        return f"{key}={shlex.quote(word)}"
    signs = (f"\\{sign}" if sign in "\\'" else sign if sign.isprintable() else _code(sign) for sign in word)
    return f"{key}=$'{''.join(signs)}'"


def _code(sign: str) -> str:
    return f"\\x{ord(sign):02x}" if ord(sign) < 128 else f"\\U{ord(sign):08x}"


def exists(key: str, keys: Mapping[str, Any]) -> bool:
    """Whether a value can be set under this name: a key of the schema, or a name in one that is a mapping."""
    return key in keys or any(get_origin(keys[known]) is dict and key.startswith(f"{known}.") for known in keys)


def is_section(key: str, keys: Collection[str]) -> bool:
    return any(known.startswith(f"{key}.") for known in keys)


def unknown_key(key: str, keys: Collection[str], source: str) -> ValueError:
    return ValueError(f"There is no configuration key {key} ({source}): did you mean {nearest_key(key, keys)}?")


def _advice(key: str, keys: Mapping[str, Any]) -> str:
    """What to type for a key that is not text, in a shell."""
    hint = _hint(key, keys)
    if get_origin(hint) in (list, dict):
        example = '["a b"]' if get_origin(hint) is list else '{name: "a b"}'
        return f"put texts in it in double quotes, and all of it in single quotes, {key}='{example}' in a shell"
    return f"it must be {expected(hint)}, and stand in quotes where it has signs of the shell's or Hydra's"


def _hint(key: str, keys: Mapping[str, Any]) -> Any:
    section, _, _ = key.rpartition(".")
    of_mapping = get_args(keys[section]) if section in keys else ()
    return keys.get(key, of_mapping[-1] if of_mapping else None)


def _text_value(key: str, written: str) -> Any:
    """The value of a key that is text."""
    said = f"{key}={written!r} ({COMMAND_LINE})"
    try:
        override = _parse(f"{key}={written}")
    except HydraException:
        if written.lstrip()[:1] in ("'", '"') or _ESCAPE.search(written):
            raise ValueError(
                f"{said} begins with a quote or has a backslash before a sign of Hydra's, and is no whole value of its "
                f"grammar: put all of it in quotes, {bash_form(key, written)} in a shell."
            ) from None
        return Scalar(written, written, COMMAND_LINE)
    value = override.value()
    if override.value_type == ValueType.SIMPLE_CHOICE_SWEEP and not _ESCAPE.search(written):
        return Scalar(written, written, COMMAND_LINE)
    if isinstance(value, Scalar) and not _CALL.fullmatch(written):
        is_as_written = value.value is not None and written.strip()[:1] not in ("'", '"')
        if is_as_written and not _ESCAPE.search(written):
            return Scalar(written, value.value, COMMAND_LINE)
        return value
    if value == "" and not written.strip():
        return Scalar(written, written, COMMAND_LINE)
    raise ValueError(
        f"{said} is a list, a mapping or a function in Hydra's grammar, and the key must be text: put it in quotes, "
        f"{bash_form(key, written)} in a shell."
    )


class _Visitor(HydraOverrideVisitor):
    """Hydra's, but scalars keep their source text. Arguments of functions are what they are for Hydra."""

    _in_function = False

    def visitFunction(self, ctx: Any) -> Any:
        self._in_function, outer = True, self._in_function
        try:
            return super().visitFunction(ctx)
        finally:
            self._in_function = outer

    def _createPrimitive(self, ctx: Any) -> Any:
        try:
            value = super()._createPrimitive(ctx)
        except ValueError:  # more digits than Python takes
            value = ctx.getText().strip()
        if self._in_function:
            return value
        if isinstance(value, QuotedString):
            return Scalar(value.text, value.text, COMMAND_LINE)
        return Scalar(value if isinstance(value, str) else ctx.getText().strip(), value, COMMAND_LINE)


def _parse(text: str) -> Override:
    """As ``OverridesParser.parse_override``, with the visitor above."""
    listener = HydraErrorListener()
    lexer = OverrideLexer(InputStream(text))
    lexer.removeErrorListeners()
    lexer.addErrorListener(listener)
    parser = OverrideParser(CommonTokenStream(lexer))
    parser.removeErrorListeners()
    parser.addErrorListener(listener)
    override: Override = _Visitor(create_functions()).visit(parser.override())
    override.input_line = text
    override.validate()
    return override
