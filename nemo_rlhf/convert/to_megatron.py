"""Writing a model as a Megatron checkpoint's weights, in parts that several processes share. No model is built."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.families import weight_map
from nemo_rlhf.convert.files import blocks, common, moved, within
from nemo_rlhf.convert.keys import written
from nemo_rlhf.convert.mapping import Box, Cut, Entry, WeightMap, whole
from nemo_rlhf.convert.source import SafetensorsSource, WeightSource
from nemo_rlhf.convert.torch_dist import Chunk, ChunkFile, StoredTensor, write_metadata
from nemo_rlhf.convert.workers import each

# Bytes of a chunk, which is held in memory while it is written, and of a file. Readers read whole chunks.
_CHUNK = 64 * 2**20
_FILE = 512 * 2**20
_LINEAR = re.compile(r"(linear_qkv|linear_proj|linear_fc1|linear_fc2)\.weight$")


class _Part(NamedTuple):
    """A box of the parameter ``megatron``, to become one chunk."""

    megatron: str
    box: Box


class _File(NamedTuple):
    """One file to write."""

    name: str
    parts: tuple[_Part, ...]


class _Written(NamedTuple):
    """A file as it is: where each part starts and its length, in bytes; how many elements came from the source."""

    file: _File
    places: tuple[tuple[int, int], ...]
    size: int
    crc: int
    elements: int


@dataclass
class _Writer:
    """Fills files; sent to every worker."""

    source: WeightSource
    weights: WeightMap
    dtypes: dict[str, torch.dtype]
    directory: Path
    memory: bytearray = field(default_factory=bytearray)  # of the chunk at hand; used again, for new pages cost time

    def __call__(self, file: _File) -> _Written:
        stream = ChunkFile(self.directory / file.name)
        places, elements = [], 0
        try:
            for part in file.parts:
                values = self._empty([p.stop - p.start for p in part.box], self.dtypes[part.megatron])
                elements += fill(values, part.box, self.weights.entries[part.megatron], self.source)
                stacked = written(self.weights.architecture, part.megatron).leading
                places.append(stream.add(values[(None,) * len(stacked)]))
        finally:
            stream.close()
        return _Written(file, tuple(places), stream.size, stream.crc, elements)

    def _empty(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape)
        if len(self.memory) < count * dtype.itemsize:
            self.memory = bytearray(count * dtype.itemsize)
        return torch.frombuffer(self.memory, dtype=dtype, count=count).view(shape)


def fill(target: torch.Tensor, box: Box, entry: Entry, source: WeightSource) -> int:
    """Fill ``target`` with box ``box`` of a parameter that is not cut; returns the number of its elements.

    The source is asked for a few megabytes at a time.
    """
    filled = 0
    for piece in entry.pieces(uncut(entry.architecture)):
        if (shared := common(piece.inside, box)) is None:
            continue
        name, place = entry.names[piece.tensor], target[within(shared, box)]
        if entry.row.layout.transposed:
            place, outside = place.T, moved(shared[::-1], piece.inside[::-1], piece.outside)
        else:
            outside = moved(shared, piece.inside, piece.outside)
        if isinstance(source, SafetensorsSource) and source.dtype(name) == target.dtype:
            source.read_into(place, name, outside)  # saves a copy
        else:
            _copy(place, source, name, outside)
        filled += place.numel()
    assert filled == target.numel(), f"{entry.megatron}: {filled} of {target.numel()} elements"
    return filled


def _copy(place: torch.Tensor, source: WeightSource, name: str, box: Box) -> None:
    row = math.prod(part.stop - part.start for part in box[1:]) * source.dtype(name).itemsize
    first = box[0].start
    for start, stop in blocks(first, box[0].stop, row):
        place[start - first : stop - first] = source.read(name, (slice(start, stop), *box[1:]))


def uncut(architecture: Architecture) -> Cut:
    """The whole model on one rank, without padding: readers of any cut pad for themselves."""
    return Cut(rank=0, size=1, padded_vocab_size=architecture.vocab_size)


def write_weights(
    source: WeightSource, architecture: Architecture, directory: Path, workers: int
) -> tuple[dict[str, list[int]], int]:
    """Write a ``torch_dist`` directory, which must exist and be empty.

    Returns:
        Size and CRC-32 of each chunk file, and the number of parameters written.
    """
    weights = weight_map(architecture)
    entries = {entry.megatron: entry for entry in weights.entries.values()}
    dtypes = _dtypes(source, entries, architecture)
    files = list(_files(entries, dtypes))
    chunks: dict[str, list[Chunk]] = {}
    described, elements = {}, 0
    results = each(_Writer(source, weights, dtypes, directory), files, workers)
    for result in sorted(results, key=lambda result: result.file.name):
        described[result.file.name] = [result.size, result.crc]
        elements += result.elements
        for part, (start, length) in zip(result.file.parts, result.places, strict=True):
            place = written(architecture, part.megatron)
            box = (*(slice(n, n + 1) for n in place.leading), *part.box)
            chunks.setdefault(place.key, []).append(Chunk(box, result.file.name, start, length))
    tensors = {}
    for megatron, entry in entries.items():
        place = written(architecture, megatron)
        shape = (*place.sizes, *entry.local_shape(uncut(architecture)))
        tensors[place.key] = StoredTensor(shape, dtypes[megatron], tuple(chunks[place.key]))
    write_metadata(directory, tensors, list(_extra_states(entries, architecture)), f"__{len(files)}_0.distcp")
    return described, elements


def _dtypes(source: WeightSource, entries: dict[str, Entry], architecture: Architecture) -> dict[str, torch.dtype]:
    """By parameter. Those that are stacked in one tensor share the narrowest that holds each exactly."""
    found: dict[str, set[torch.dtype]] = {}
    for megatron, entry in entries.items():
        found.setdefault(written(architecture, megatron).key, set()).update(map(source.dtype, entry.names))
    stored = {key: reduce(torch.promote_types, dtypes) for key, dtypes in found.items()}
    return {megatron: stored[written(architecture, megatron).key] for megatron in entries}


def _files(entries: dict[str, Entry], dtypes: dict[str, torch.dtype]) -> Iterator[_File]:
    """All parameters in order, cut into chunks along their rows; the same files for any number of workers."""
    parts: list[_Part] = []
    number = size = 0
    for megatron, entry in entries.items():
        shape = entry.local_shape(uncut(entry.architecture))
        row = math.prod(shape[1:]) * dtypes[megatron].itemsize
        for start, stop in blocks(0, shape[0], row, _CHUNK):
            if size >= _FILE:
                yield _File(f"__{number}_0.distcp", tuple(parts))
                parts, number, size = [], number + 1, 0
            parts.append(_Part(megatron, (slice(start, stop), *whole(shape[1:]))))
            size += (stop - start) * row
    yield _File(f"__{number}_0.distcp", tuple(parts))


def _extra_states(entries: dict[str, Entry], architecture: Architecture) -> Iterator[str]:
    """Keys of the (empty) extra states that megatron-core's linear layers have, and look for when they are loaded."""
    for megatron in entries:
        if _LINEAR.search(megatron):
            place = written(architecture, megatron)
            offsets, sizes = (".".join(map(str, axes)) for axes in (place.leading or (0,), place.sizes or (1,)))
            yield f"{place.key.removesuffix('weight')}_extra_state/shard_{offsets}_{sizes}"
