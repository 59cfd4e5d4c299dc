"""A checkpoint's manifest: size and CRC-32 of each of its files."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


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
