"""megatron-core's ``torch_dist`` format without a process group: torch's distributed checkpoint, read and written chunk
by chunk.

A stored tensor is whole, whatever the layout that wrote it, and cut into chunks; each is what ``torch.save`` makes of
it, at some place of a ``.distcp`` file, and ``.metadata`` says where. ``metadata.json`` and ``common.pt`` are what
megatron-core adds.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

from nemo_rlhf.convert.files import Array, common, start_writing_out, within
from nemo_rlhf.convert.mapping import Box, Shape

_KIND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class Chunk(NamedTuple):
    """A part of a stored tensor: its box there, and where it lies in a file, in bytes."""

    box: Box
    file: str
    start: int
    length: int


class StoredTensor(NamedTuple):
    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def read_metadata(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a ``torch_dist`` directory. Raises ValueError when its metadata is missing or damaged."""
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    from nemo_rlhf.parallel import metadata

    found = metadata.read_metadata(directory)
    tensors = {}
    for key, tensor in found.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            continue
        chunks = []
        for chunk in tensor.chunks:
            if (place := found.storage_data.get(MetadataIndex(key, chunk.offsets))) is None:
                raise ValueError(f"{directory} lacks a part of {key}: use another checkpoint.")
            box = tuple(slice(a, a + size) for a, size in zip(chunk.offsets, chunk.sizes, strict=True))
            chunks.append(Chunk(box, place.relative_path, place.offset, place.length))
        tensors[key] = StoredTensor(tuple(tensor.size), tensor.properties.dtype, tuple(chunks))
    return tensors


class Reader:
    """Boxes of the tensors in a ``torch_dist`` directory; only their bytes are read."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError when the metadata is missing or damaged."""
        self.directory = directory
        self.tensors = read_metadata(directory)
        self._arrays: dict[tuple[str, int], Array] = {}
        self._last: tuple[str, tuple[int, ...], list[Chunk]] = ("", (), [])

    def read_into(self, target: torch.Tensor, key: str, leading: tuple[int, ...], box: Box) -> int:
        """Fill ``target`` with box ``box`` of ``tensor[leading]``; returns how many elements the chunks had of it."""
        filled = 0
        for chunk in self._chunks(key, leading):
            inner = chunk.box[len(leading) :]
            if (shared := common(inner, box)) is not None:
                index = tuple(slice(n - part.start, n - part.start + 1) for n, part in _paired(leading, chunk))
                place = target[within(shared, box)]
                self._array(chunk, self.tensors[key].dtype).read_into(
                    place[(None,) * len(leading)], (*index, *within(shared, inner))
                )
                filled += place.numel()
        return filled

    def _chunks(self, key: str, leading: tuple[int, ...]) -> list[Chunk]:
        """Those with values of ``tensor[leading]``. The last are kept: a tensor is read from one end to the other."""
        if self._last[:2] != (key, leading):
            chunks = self.tensors[key].chunks
            found = [c for c in chunks if all(part.start <= n < part.stop for n, part in _paired(leading, c))]
            self._last = (key, leading, found)
        return self._last[2]

    def _array(self, chunk: Chunk, dtype: torch.dtype) -> Array:
        place = (chunk.file, chunk.start)
        if place not in self._arrays:
            self._arrays[place] = _open(self.directory / chunk.file, chunk, dtype)
        return self._arrays[place]


def _paired(leading: tuple[int, ...], chunk: Chunk) -> Iterator[tuple[int, slice]]:
    return zip(leading, chunk.box[: len(leading)], strict=True)


def _open(path: Path, chunk: Chunk, dtype: torch.dtype) -> Array:
    """Where the values of a chunk lie in its file; they are not read."""
    from torch.distributed.checkpoint.utils import _create_file_view

    try:
        with path.open("rb") as file:
            view: Any = _create_file_view(file, chunk.start, chunk.length)
            tensor = torch.load(view, map_location="meta", weights_only=True)
            view.seek(0)
            reader: Any = torch._C.PyTorchFileReader(view)
            offset = reader.get_record_offset("data/0")
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): use another checkpoint.") from None
    shape = tuple(part.stop - part.start for part in chunk.box)
    is_plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.is_contiguous()
    if not is_plain or (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        raise ValueError(f"{path} holds other values than its .metadata says: use another checkpoint.")
    return Array(path, chunk.start + offset + tensor.storage_offset() * dtype.itemsize, shape, dtype)


class ChunkFile:
    """A ``.distcp`` file that is being written; keeps the CRC-32 of what went into it."""

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb", buffering=0)
        self.size = self.crc = 0
        self._failure: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        try:
            while rest:
                count = self._file.write(rest)
                self.crc = zlib.crc32(rest[:count], self.crc)
                self.size, rest = self.size + count, rest[count:]
        except OSError as error:  # torch.save says less of it
            self._failure = error
            raise
        return memoryview(data).nbytes

    def flush(self) -> None:  # nothing is held back; torch.save asks
        pass

    def add(self, values: torch.Tensor) -> tuple[int, int]:
        """Append a tensor that has its memory for itself; returns where it starts and its length in bytes."""
        start = self.size
        kept = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)  # the file has one of its own, in the manifest
        try:
            torch.save(values, cast(IO[bytes], self))
        except RuntimeError:
            if self._failure is not None:
                raise self._failure from None
            raise
        finally:
            torch.serialization.set_crc32_options(kept)
        start_writing_out(self._file.fileno(), start, self.size - start)
        return start, self.size - start

    def close(self) -> None:
        self._file.close()


def write_metadata(
    directory: Path, tensors: Mapping[str, StoredTensor], objects: Sequence[str], objects_file: str
) -> None:
    """Complete a ``torch_dist`` directory whose chunk files are there.

    Args:
        objects: keys of megatron-core's ``ShardedObject``s that are None (the linear layers' extra states);
            ``objects_file``, a new file, will hold them.
    """
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.storage import WriteResult

    described: dict[str, Any] = {}
    results = []

    def add(key: str, offsets: torch.Size | None, file: str, start: int, length: int) -> None:
        index = dcp.MetadataIndex(key, offsets)
        results.append(WriteResult(index, length, _StorageInfo(file, start, length)))

    for key, tensor in tensors.items():
        pieces = []
        for chunk in tensor.chunks:
            offsets = torch.Size(part.start for part in chunk.box)
            pieces.append(dcp.ChunkStorageMetadata(offsets, torch.Size(part.stop - part.start for part in chunk.box)))
            add(key, offsets, chunk.file, chunk.start, chunk.length)
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        described[key] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), pieces)
    buffer = io.BytesIO()
    torch.save([None], buffer)
    nothing = buffer.getvalue()
    (directory / objects_file).write_bytes(nothing * len(objects))
    for number, key in enumerate(objects):
        described[key] = dcp.BytesStorageMetadata()
        add(key, None, objects_file, number * len(nothing), len(nothing))
    FileSystemWriter(str(directory)).finish(dcp.Metadata(described), [results])
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (directory / "common.pt").write_bytes(buffer.getvalue())
    (directory / "metadata.json").write_text(json.dumps(_KIND))
