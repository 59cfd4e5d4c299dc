"""A configuration as text, for files and pages that others may read: whole enough to run again, without secrets."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_rlhf.config.overrides import literal
from nemo_rlhf.config.scalars import to_yaml

MASK = "***"
# as libraries read them: of a service, all up to the last @ of the host's part; of a database, a password may have /
_SERVICE = re.compile(r"(?P<scheme>\bhttps?)://[^\s/?#]*@", re.IGNORECASE)
_DATABASE = re.compile(r"(?P<start>\b(?!https?:)[A-Za-z][\w+.-]*://[^\s/:@]*):[^\s@]*@", re.IGNORECASE)
_SECRET = (
    r"(?!\w*(?:bos|eos|end|pad|unk|sep|cls|mask|stop)_tokens?\b)"
    r"[\w.-]*(?:keys?|tokens?|secrets?|pass[\w-]*|authorization|credentials?)"
)
_QUERY = re.compile(rf"(?P<name>[?&]{_SECRET})=[^&\s'\"]+", re.IGNORECASE)
_MASKED_URL = re.compile(rf"://(?:[^\s/:@]*:)?\*\*\*@|[?&]{_SECRET}=\*\*\*(?![^&\s'\"])", re.IGNORECASE)
_NAME = re.compile(rf"{_SECRET}", re.IGNORECASE)
_ENTRY = re.compile(rf"[{{,]\s*['\"]?{_SECRET}['\"]?\s*:\s*", re.IGNORECASE)
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$)""", re.DOTALL)
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_NO_TEXT = re.compile(rf"(?:[\s,\[\]]+|\b(?:true|false|null)\b|~|{_NUMBER}(?![^\s,\]]))*", re.IGNORECASE)
_OPEN = ("arguments", "headers", "wandb_logger_kwargs", "environment")  # mappings whose names are not ours
_URLS = ("store", "url")  # keys of ours that hold one
_TEXTS = ("data", "generation")  # sections whose texts are nobody's secrets
_AS_WRITTEN = "_as_written"

Place = tuple[str | int, ...]


def dump(cfg: Any) -> str:
    """``cfg`` as the yaml text of a file that ``--config`` reads back.

    Text with an interpolation stands as it was written, so that no variable of the environment is told. Passwords in
    URLs, and what is named as a secret among arguments of functions, are masked, and must be given again.
    """
    written: dict[Place, tuple[str, Any]] = getattr(cfg, _AS_WRITTEN, {})

    def show(place: Place, value: Any) -> Any:
        if place in written and written[place][1] == value:
            return written[place][0]
        if not isinstance(value, str):
            return value
        if _is_secret(place):
            return MASK if value else value
        return literal(masked(value) if _may_be_url(place) else value)

    return to_yaml(_mapped(asdict(cfg), show))


def masked(text: str) -> str:
    """``text`` with passwords in URLs replaced by ``MASK``, in those of services the user's name, too, which often is
    a key."""

    text = _SERVICE.sub(rf"\g<scheme>://{MASK}@", text)
    return _QUERY.sub(rf"\g<name>={MASK}", _DATABASE.sub(rf"\g<start>:{MASK}@", text))


def masked_word(word: str) -> str:
    """A word of a command line, masked as the configuration that it sets is in ``dump``."""
    key, equals, value = word.partition("=")
    place = tuple(key.lstrip("+").split("."))
    if not equals or place[0] in _TEXTS:
        return word if equals else masked(word)
    if _is_secret(place):
        return word if _NO_TEXT.fullmatch(value) else f"{key}={MASK}"
    return masked(f"{key}={_masked_entries(value)}")


def _masked_entries(text: str) -> str:
    """``text`` in Hydra's grammar, with the values of entries that are named as secrets replaced by ``MASK``."""
    done, start = [], 0
    while (entry := _ENTRY.search(text, start)) is not None:
        end = _value_end(text, entry.end())
        value = text[entry.end() : end]
        done += [text[start : entry.end()], value if _NO_TEXT.fullmatch(value) else MASK]
        start = end
    return "".join(done) + text[start:]


def _value_end(text: str, start: int) -> int:
    """Where a value that begins at ``start`` ends: at its last quote or bracket, or before what ends it."""
    depth, place = 0, start
    while place < len(text):
        sign = text[place]
        if sign in "'\"" and (quoted := _QUOTED.match(text, place)) is not None:
            place = quoted.end()
            continue
        if depth == 0 and sign in ",}])":
            break
        depth += (sign in "([{") - (sign in ")]}")
        place += 2 if sign == "\\" else 1
    return min(place, len(text))


def _is_secret(place: Sequence[str | int]) -> bool:
    """Whether what stands there is named as a secret: by any name below a mapping whose names are not ours."""
    first = next((number for number, name in enumerate(place) if name in _OPEN), len(place))
    return any(isinstance(name, str) and _NAME.fullmatch(name) for name in place[first + 1 :])


def _may_be_url(place: Place) -> bool:
    return place[0] not in _TEXTS and (place[-1] in _URLS or not {*place}.isdisjoint(_OPEN))


def write_private(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file that only its owner can read, also where it was there before."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8", newline="") as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), mode)
        file.write(text)


def note_interpolations(cfg: Any, written: Any) -> None:
    """Remember which values of ``cfg`` were interpolations in ``written``, its form before they were resolved."""
    texts: dict[Place, str] = {}
    _mapped(written, lambda place, value: texts.update({place: value}) if _interpolates(value) else None)
    noted: dict[Place, tuple[str, Any]] = {}

    def note(place: Place, value: Any) -> None:
        if place in texts and (isinstance(value, str) or "oc.env" in texts[place]):
            noted[place] = (texts[place], value)

    _mapped(asdict(cfg), note)
    setattr(cfg, _AS_WRITTEN, noted)


def refuse_masks(cfg: Any) -> None:
    """Raises ValueError for a value that ``dump`` has masked."""

    def check(place: Place, value: Any) -> None:
        if not isinstance(value, str):
            return
        if value == MASK if _is_secret(place) else _may_be_url(place) and _MASKED_URL.search(value):
            key = ".".join(map(str, place))
            raise ValueError(
                f"{key} has {MASK} in the place of a secret, as the config.yaml of a run does: set {key} again, or "
                f"name a variable of the environment that holds it, as ${{oc.env:NAME}}."
            )

    _mapped(asdict(cfg), check)


def _interpolates(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _mapped(value: Any, change: Callable[[Place, Any], Any], place: Place = ()) -> Any:
    """``value`` with each of its values that is no list or mapping replaced by what ``change`` makes of it."""
    if isinstance(value, dict):
        return {name: _mapped(one, change, (*place, name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, change, (*place, number)) for number, one in enumerate(value)]
    return change(place, value)
