"""Values as they were written: what a yaml file or an override says stays text until the schema says what it is.

YAML 1.1 reads 12:00:00 as 43200, 0123 as 83 and no as false; Hydra's overrides read 1e3 as 1000.0. So every scalar is
read together with its source text, and the type of its key decides which of the two counts.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import IO, Any, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from nemo_rlhf.config.keys import expected

# Numbers that nobody takes for anything else, and what only YAML 1.1 takes for one.
_PLAIN_NUMBER = re.compile(
    r"[-+]?(0|[1-9]\d*)|[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_ODD_NUMBER = re.compile(r"[-+]?0[\d_]+|.*:.*")
_WHOLE_NUMBER = re.compile(r"0|-?[1-9]\d{0,99}")  # as Python writes it, too
_MOST_NODES = 100_000  # of a file, each alias counted as what it stands for
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_SIGNS = {f"tag:yaml.org,2002:{name}" for name in ("value", "merge")}  # = and <<, where they are values


@dataclass(frozen=True)
class Scalar:
    """``text`` as it was written, without quotes; ``value``: what the grammar of its place makes of it."""

    text: str
    value: str | int | float | bool | None
    where: str  # "from FILE, line 3" | "from the command line"


def typed(value: Any, hint: Any, key: str, where: str) -> Any:
    """``value``, whose scalars are ``Scalar``, as the type ``hint`` of ``key`` wants it. For a mapping, ``hint`` may be
    one from its names to their types, or a function that gives that. Names are text; where anything goes, those that
    are whole numbers stay numbers.

    Raises:
        ValueError: a scalar that can be read in two ways, or null or a container where text is needed.
    """
    if isinstance(value, Scalar):
        return _typed_scalar(value, hint, key)
    if is_text(hint) and isinstance(value, list | dict):
        where = first_place(value, where)
        raise ValueError(f"{key}={shown(value)} ({where}) has the wrong type: it must be {expected(hint)}.")
    if isinstance(value, list):
        inner = get_args(hint)[0] if get_origin(hint) is list else hint
        return [typed(one, inner, f"{key}[{place}]", where) for place, one in enumerate(value)]
    if isinstance(value, dict):
        entry = {_name(name, hint is Any): one for name, one in value.items()}
        known = hint(entry) if isinstance(hint, types.FunctionType) else hint
        return {name: typed(one, _of_entry(known, name), f"{key}.{name}", where) for name, one in entry.items()}
    return value


def _name(name: Any, is_open: bool) -> str | int:
    text, value = (name.text, name.value) if isinstance(name, Scalar) else (str(name), name)
    return value if is_open and type(value) is int and _WHOLE_NUMBER.fullmatch(text) else text


def shown(value: Any) -> str:
    """A value in messages, as it was written where that is known."""
    if isinstance(value, Scalar):
        text = value.text or shown(value.value)
        return text if text.isprintable() else repr(text)
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{shown(name)}: {shown(one)}' for name, one in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def first_place(value: Any, otherwise: str) -> str:
    """Where the first scalar of ``value`` was written."""
    if isinstance(value, Scalar):
        return value.where
    inner: Iterable[Any] = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((first_place(one, otherwise) for one in inner), otherwise)


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Scalar) and value.value is None)


def to_yaml(data: Any) -> str:
    """Yaml that ``Reader`` reads back: text that it would take for something else stands in quotes."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class Reader:
    """Reads yaml files for Hydra, which lays them over one another: it gets marks in the place of their scalars, and
    ``restore`` puts a ``Scalar`` in the place of each."""

    def __init__(self) -> None:
        self._scalars: list[Scalar] = []

    def load(self, file: IO[str]) -> Any:
        """As ``OmegaConf.load``, for a file of configuration. Its ``defaults`` and ``hydra`` are for Hydra to read.

        Raises:
            ValueError: it is no mapping, or its aliases make it endless or huge.
        """
        loader = _loader()(file)
        loader.scalars, loader.file = self._scalars, file.name
        try:
            node = loader.get_single_node()
            if node is None:
                return OmegaConf.create({})
            if not isinstance(node, yaml.MappingNode):
                raise ValueError(f"{file.name}, line {node.start_mark.line + 1}: write key: value, a mapping of names.")
            if _size(node, {}) > _MOST_NODES:
                raise ValueError(f"{file.name} stands for more than {_MOST_NODES} values: use fewer aliases.")
            of_hydra = [pair for pair in node.value if pair[0].value in ("defaults", "hydra")]
            node.value = [pair for pair in node.value if pair not in of_hydra]
            data = loader.construct_document(node)
        finally:
            loader.dispose()
        plain = get_yaml_loader()("")
        return OmegaConf.create(data | {name.value: plain.construct_document(value) for name, value in of_hydra})

    def restore(self, value: Any) -> Any:
        """What Hydra composed, with a ``Scalar`` for each mark."""
        if isinstance(value, dict):
            return {name: self.restore(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self.restore(one) for one in value]
        mark = re.fullmatch(r"<(\d+)>", value) if isinstance(value, str) else None
        return self._scalars[int(mark[1])] if mark else value


def _typed_scalar(scalar: Scalar, hint: Any, key: str) -> Any:
    text, value, said = scalar.text, scalar.value, f"{key}={shown(scalar)} ({scalar.where})"
    if is_text(hint):
        if value is None and (text == "~" or hint is str):
            raise ValueError(f'{said} stands for null here: put it in quotes to mean text, as "{text}".')
        value = None if value is None else text
    elif isinstance(value, bool) and hint is not bool and text.lower() not in ("true", "false"):
        raise ValueError(f"{said} may mean {shown(value)} or text: write {shown(value)}, or put it in quotes.")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        is_number = hint in (int, float) or {int, float} & set(get_args(hint))
        if _ODD_NUMBER.fullmatch(text) if is_number else not _PLAIN_NUMBER.fullmatch(text):
            quotes = "" if is_number else ", or put it in quotes to mean text"
            raise ValueError(f"{said} may mean {value}: write the number in plain digits{quotes}.")
    if isinstance(value, str) and "${" in value:
        try:
            OmegaConf.create([value])
        except OmegaConfBaseException:
            raise ValueError(
                f"{said} has ${{, which begins an interpolation, and is none: write \\${{ to mean the characters."
            ) from None
    return value


def is_text(hint: Any) -> bool:
    is_union = get_origin(hint) in (Union, types.UnionType)
    return hint is str or (is_union and set(get_args(hint)) == {str, type(None)})


def _of_entry(hint: Any, name: str | int) -> Any:
    """The type of one value of a mapping."""
    if isinstance(hint, dict):
        return hint.get(name, Any)
    return get_args(hint)[1] if get_origin(hint) is dict else Any


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Nodes below this one, infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def _written_name(node: yaml.ScalarNode) -> str | int:
    is_number = node.style is None and node.tag.endswith(":int") and _WHOLE_NUMBER.fullmatch(node.value)
    return int(node.value) if is_number else str(node.value)


@cache
def _loader() -> Any:
    class Loader(get_yaml_loader()):  # type: ignore[misc]
        """OmegaConf's, but scalars become marks, and names are text, or whole numbers without quotes."""

        scalars: list[Scalar]
        file: str

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            if not isinstance(node, yaml.ScalarNode) or node.tag not in _TAGS | _SIGNS:
                return super().construct_object(node, deep=deep)
            value = node.value
            if node.tag in _TAGS:
                with suppress(ValueError):  # "0x_", or more digits than Python takes
                    value = super().construct_object(node, deep=deep)
            self.scalars.append(Scalar(node.value, value, f"from {self.file}, line {node.start_mark.line + 1}"))
            return f"<{len(self.scalars) - 1}>"

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str | int, Any]:
            seen = set()
            for name, _ in node.value:
                if not isinstance(name, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "found a name that is no text", name.start_mark)
                if name.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"found {name.value} twice", name.start_mark)
                seen.add(name.value)
            self.flatten_mapping(node)
            return {_written_name(name): self.construct_object(value, deep=deep) for name, value in node.value}

    return Loader


class _Dumper(yaml.SafeDumper):
    pass


for _first, _resolvers in get_yaml_loader().yaml_implicit_resolvers.items():
    for _tag, _regexp in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _regexp, [_first])
