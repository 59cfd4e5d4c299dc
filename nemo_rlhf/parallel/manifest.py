"""A checkpoint's manifest: size and CRC-32 of each of its files."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

MANIFEST = "manifest.json"


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
