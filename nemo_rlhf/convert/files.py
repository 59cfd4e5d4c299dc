"""Boxes of arrays that lie in files.

Files are not mapped: pages of a mapped file count as this process's memory, all of it once a model has been read.
"""

from __future__ import annotations

import math
import os
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nemo_rlhf.convert.mapping import Box, Shape, whole

# what is moved at a time, in bytes
BLOCK = 16 * 2**20


class Array(NamedTuple):
    """Where a row-major array lies: ``offset`` is in bytes from the file's start."""

    path: Path
    offset: int
    shape: Shape
    dtype: torch.dtype

    def read(self, box: Box) -> torch.Tensor:
        """A copy of the values in ``box``. Raises ValueError when the file ends before them."""
        result = torch.empty([part.stop - part.start for part in box], dtype=self.dtype)
        self.read_into(result, box)
        return result

    def read_into(self, target: torch.Tensor, box: Box) -> None:
        """Copy the values in ``box`` to ``target``, of the box's shape and the array's dtype."""
        with self.path.open("rb", buffering=0) as file:
            self._read(file, self.offset, self.shape, target, box)

    def _read(self, file: FileIO, offset: int, shape: Shape, target: torch.Tensor, box: Box) -> None:
        row = math.prod(shape[1:]) * self.dtype.itemsize
        first, last = box[0].start, box[0].stop
        if len(shape) > 2:
            for place, index in zip(target, range(first, last), strict=True):
                self._read(file, offset + index * row, shape[1:], place, box[1:])
        elif box[1:] == whole(shape[1:]) and target.is_contiguous():
            self._fill(file, offset + first * row, target)
        else:
            for start, stop in blocks(first, last, row):
                rows = torch.empty((stop - start, *shape[1:]), dtype=self.dtype)
                self._fill(file, offset + start * row, rows)
                target[start - first : stop - first] = rows[(slice(None), *box[1:])]

    def _fill(self, file: FileIO, offset: int, target: torch.Tensor) -> None:
        rest = bytes_of(target)
        if hasattr(os, "posix_fadvise"):  # have the disk read ahead while this is worked on
            os.posix_fadvise(file.fileno(), offset, len(rest) + BLOCK, os.POSIX_FADV_WILLNEED)
        file.seek(offset)
        while rest:
            if not (count := file.readinto(rest)):
                raise ValueError(f"{self.path} is damaged (it ends too early): download or copy it again.")
            rest = rest[count:]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    data: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(data)


def write_at(file: int, offset: int, data: memoryview | bytes) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count


def start_writing_out(file: int, offset: int, size: int) -> None:
    """Have the disk begin with what was written there, so that little is left to wait for at the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)


def blocks(first: int, last: int, row: int, size: int = BLOCK) -> list[tuple[int, int]]:
    """Cut rows ``first`` to ``last``, of ``row`` bytes each, into runs of at most ``size`` bytes, or of one row."""
    step = max(1, size // row)
    return [(start, min(start + step, last)) for start in range(first, last, step)]


def common(first: Box, second: Box) -> Box | None:
    """What two boxes of one array share; None when they do not meet."""
    result = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return result if all(part.start < part.stop for part in result) else None


def moved(box: Box, origin: Box, target: Box) -> Box:
    """``box``, which lies in ``origin``, as it lies in ``target`` when ``origin`` is laid onto ``target``."""
    return tuple(
        slice(part.start - a.start + b.start, part.stop - a.start + b.start)
        for part, a, b in zip(box, origin, target, strict=True)
    )


def within(box: Box, origin: Box) -> Box:
    """``box`` in coordinates that start where ``origin`` does."""
    return tuple(slice(part.start - a.start, part.stop - a.start) for part, a in zip(box, origin, strict=True))
