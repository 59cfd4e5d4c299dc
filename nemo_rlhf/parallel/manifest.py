"""A checkpoint's manifest: size and CRC-32 of each of its files."""

from __future__ import annotations

import io
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from nemo_rlhf.untrusted import read_json

MANIFEST = "manifest.json"
_OF_TRAINING = "identity.json"  # beside the manifest of a training checkpoint


class Ledger:
    """Size and CRC-32 of files, as this process and its forks wrote them."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115  it lives as long as this

    def enter(self, file: Path, entry: list[int]) -> None:
        self._file.write(json.dumps([str(file), entry]) + "\n")
        self._file.flush()  # in one piece; forks share the place in the file

    def entries(self, root: Path) -> dict[str, list[int]]:
        """By the files' names in the directory ``root``."""
        self._file.seek(0)
        found = (json.loads(line) for line in self._file)
        return {str(Path(file).relative_to(root)): entry for file, entry in found}


_ledger: Ledger | None = None


@contextmanager
def recorded() -> Iterator[Ledger]:
    """What ``create`` opens inside is entered in the ledger when it is closed, also by processes forked inside."""
    global _ledger
    outer, _ledger = _ledger, Ledger()
    try:
        yield _ledger
    finally:
        _ledger = outer


class _Summed(io.BufferedWriter):
    """A new file, on the disk when it is closed, whose checksum is known without reading it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self._path, self._sum = path, 0

    def write(self, data: Any) -> int:
        self._sum = zlib.crc32(data, self._sum)
        return super().write(data)

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
            size = self.tell()
        finally:
            super().close()
        if _ledger is not None:
            _ledger.enter(self._path, [size, self._sum])


def create(path: str, mode: str) -> io.BufferedWriter:
    """As ``open``, for a file that nobody goes back in while writing it."""
    assert mode == "wb"
    return _Summed(Path(path))


def files(directory: Path) -> list[str]:
    """Names of all files below ``directory`` but its manifest, relative to it."""
    return sorted(str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file() and f.name != MANIFEST)


def describe(file: Path) -> list[int]:
    """Size in bytes and CRC-32."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return [file.stat().st_size, value]


def read(directory: Path) -> dict[str, list[int]]:
    """What the manifest of ``directory`` says of each file. Raises ValueError when it cannot be read."""
    path = directory / MANIFEST
    entries = read_json(path).get("files")
    if not isinstance(entries, dict):
        raise ValueError(f"{path} names no files: restore it.")
    for name, entry in entries.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\0" in name:
            raise ValueError(f"{path} names {name[:200]!r}, which is not below it: restore the file.")
        if not (isinstance(entry, list) and len(entry) == 2 and all(type(number) is int for number in entry)):
            raise ValueError(f"{path} has no size and checksum for {name}: restore the file.")
    return entries


def matches(file: Path, entry: list[int]) -> bool:
    """Whether a file is as ``entry`` says. Its content is read only where its size is right."""
    try:
        found = file.stat()
        return stat.S_ISREG(found.st_mode) and found.st_size == entry[0] and describe(file) == entry
    except OSError:
        return False


def entries_of(model: Path, part: str) -> dict[str, list[int]]:
    """What is known of the files in the directory ``part`` of a model: from its own manifest, or from that of the
    training checkpoint that it belongs to; nothing where there is none. Raises ValueError as ``read``."""
    whole = model.absolute()
    if (model / MANIFEST).is_file():
        entries, start = read(model), ""
    elif (whole.parent / MANIFEST).is_file() and (whole.parent / _OF_TRAINING).is_file():
        entries, start = read(whole.parent), f"{whole.name}/"
    else:
        return {}
    return {n.removeprefix(start): entry for n, entry in entries.items() if n.startswith(f"{start}{part}/")}


def check(model: Path, part: str, threads: int = 1) -> None:
    """Read the files in the directory ``part`` of a model, and compare them with its manifest, where it has one.

    Raises:
        ValueError: names the first file that is missing or differs.
    """
    entries = sorted(entries_of(model, part).items())
    with ThreadPoolExecutor(threads) as pool:
        right = pool.map(lambda item: matches(model / item[0], item[1]), entries)
        for (name, _), is_right in zip(entries, right, strict=True):
            if not is_right:
                raise damaged(model, name)


def damaged(directory: Path, name: str) -> ValueError:
    """What to raise for a file of a checkpoint that is not as its manifest says."""
    return ValueError(f"the checkpoint {directory} is damaged: {name} is missing or differs from what was saved.")


def write(directory: Path, entries: dict[str, list[int]]) -> None:
    """Write the manifest through to the disk. ``entries``: what ``describe`` says of each file."""
    path = directory / MANIFEST
    path.write_text(json.dumps({"files": entries}, indent=0))
    fsync(path)
    fsync(directory)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
