"""What others wrote: JSON, in files and in messages, is a value or one sentence; a directory is known or left alone."""

from __future__ import annotations

import json
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

MAX_FILE_BYTES = 1 << 28  # an index of a million tensors has half of it
_LFS = b"version https://git-lfs.github.com/"


def parse_json(data: bytes | str, what: str) -> Any:
    """The value of a JSON text. ``what`` begins the sentence of each error, as in "the request".

    Raises:
        ValueError: it is no JSON, not UTF-8, nested too deeply, or an object names a key twice.
    """

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names: set[str] = set()
            twin = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
            raise _TwiceError(f"{what} names {twin[:100]!r} twice in one object.")
        return result

    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=without_twins)
    except _TwiceError as error:
        raise ValueError(str(error)) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not JSON in UTF-8 (byte {error.start + 1} is none of it).") from None
    except RecursionError:
        raise ValueError(f"{what} is JSON that is nested too deeply to be read.") from None
    except ValueError as error:  # int() has one of its own, for thousands of digits
        raise ValueError(f"{what} is not JSON ({error}).") from None


class _TwiceError(ValueError):
    """A key is there twice."""


def read_json(path: Path, kind: type = dict, limit: int = MAX_FILE_BYTES) -> Any:
    """The value in a JSON file, which must be of type ``kind``.

    Raises:
        ValueError: the file is missing, cannot be read, is no regular file, larger than ``limit`` bytes or no such
            JSON; the sentence names it.
    """
    value = parse_json(read_bytes(path, limit), str(path))
    if not isinstance(value, kind):
        found = {dict: "an object", list: "a list", type(None): "null", str: "text", bool: "true or false"}
        raise ValueError(f"{path} holds {found.get(type(value), 'a number')}, not {found[kind]}: restore the file.")
    return value


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """What a small file holds. Raises ValueError as ``read_json`` does."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a device has no end, and a pipe may have no beginning
            raise ValueError(f"{path} is not a regular file: restore the file.")
        with path.open("rb") as file:
            data = file.read(min(limit, max(found.st_size, 1 << 16)) + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from None
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit} bytes, which is too much for such a file.")
    if is_lfs_pointer(data):
        raise ValueError(lfs_sentence(path))
    return data


def is_lfs_pointer(beginning: bytes) -> bool:
    """Whether a file that begins so only stands for another, which git has not fetched."""
    return beginning.startswith(_LFS)


def lfs_sentence(path: Path) -> str:
    """What to say of such a file."""
    return (
        f"{path} is only a git-LFS pointer, not the file itself: run `git lfs install` and `git lfs pull` in "
        f"{path.parent}, or fetch the model with `hf download`."
    )


def stranger(directory: Path, known: Sequence[str]) -> PurePath | None:
    """The first thing in ``directory`` that no pattern of ``known`` names, relative to it; None where all are known.

    A pattern is for a file, or with ``/`` for one in a directory there; links are strangers.
    """
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        parts = [pattern.split("/") for pattern in known]
        if path.is_symlink() or not any(_fits(name.parts, pattern, whole=not path.is_dir()) for pattern in parts):
            return name
    return None


def _fits(name: Sequence[str], pattern: Sequence[str], whole: bool) -> bool:
    """Whether a path, or with ``whole=False`` the beginning of one, is as ``pattern`` says."""
    right = len(name) == len(pattern) if whole else len(name) < len(pattern)
    return right and all(map(fnmatchcase, name, pattern))
