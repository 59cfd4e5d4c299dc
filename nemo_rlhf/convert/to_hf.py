"""Writing weights as safetensors files, in parts that several processes share."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nemo_rlhf.convert.files import Array, blocks, bytes_of, start_writing_out, write_at
from nemo_rlhf.convert.mapping import whole
from nemo_rlhf.convert.safetensors_io import lay_out
from nemo_rlhf.convert.source import WeightSource
from nemo_rlhf.convert.workers import each

# bytes that a worker writes before it asks for more
_TASK = 256 * 2**20


class _Rows(NamedTuple):
    """Rows ``start`` to ``stop`` of a tensor."""

    name: str
    start: int
    stop: int


@dataclass
class _Writer:
    """Writes rows to their places; sent to every worker."""

    source: WeightSource
    arrays: dict[str, Array]

    def __call__(self, rows: _Rows) -> int:
        array = self.arrays[rows.name]
        size = math.prod(array.shape[1:]) * array.dtype.itemsize
        elements = 0
        file = os.open(array.path, os.O_WRONLY)
        try:
            for start, stop in blocks(rows.start, rows.stop, size):
                values = self.source.read(rows.name, (slice(start, stop), *whole(array.shape[1:])))
                write_at(file, array.offset + start * size, bytes_of(values))
                start_writing_out(file, array.offset + start * size, (stop - start) * size)
                elements += values.numel()
        finally:
            os.close(file)
        return elements


def write_safetensors(
    source: WeightSource, directory: Path, max_shard_bytes: float, workers: int, stem: str = "model"
) -> int:
    """All tensors of ``source`` as ``<stem>.safetensors``, or as shards with an index where that would be too large.
    Returns the number of elements written."""
    shards = _plan(source, max_shard_bytes)
    arrays: dict[str, Array] = {}
    for number, names in enumerate(shards, start=1):
        part = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"{stem}{part}.safetensors"
        header = lay_out(directory / file, {name: (source.shape(name), source.dtype(name)) for name in names})
        with (directory / file).open("wb") as stream:
            stream.write(header.content)
            stream.truncate(header.size)
        arrays |= header.arrays
    if len(shards) > 1:
        total = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays.values())
        files = {name: array.path.name for name, array in sorted(arrays.items())}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    tasks = []
    for name in source.names():
        array = arrays[name]
        row = math.prod(array.shape[1:]) * array.dtype.itemsize
        tasks += [_Rows(name, start, stop) for start, stop in blocks(0, array.shape[0], row, _TASK)]
    return sum(each(_Writer(source, arrays), tasks, workers))


def _plan(source: WeightSource, max_shard_bytes: float) -> list[list[str]]:
    """Names by shard, in order. A tensor above the limit gets a shard of its own."""
    shards: list[list[str]] = []
    room = 0.0
    for name in source.names():
        size = math.prod(source.shape(name)) * source.dtype(name).itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards
