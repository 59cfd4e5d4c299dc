"""A checkpoint's ``.metadata``, read without running anything that its author wrote.

torch's distributed checkpoint keeps it as a pickle, which may call whatever it names. Here names stand for inert
records; what they say is checked, and torch's own objects are made of it.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_rlhf.untrusted import is_lfs_pointer, lfs_sentence, read_bytes

_FILE = ".metadata"
_MAX_BYTES = 1 << 33
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties MetadataIndex "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.serialization": "_get_layout",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
    "pathlib": "PosixPath PurePosixPath",
    "pathlib._local": "PosixPath PurePosixPath",  # where Python 3.13 has them
}


class _Record:
    """Stands for an object of one of those classes: what it was made of, and nothing that runs."""

    __slots__ = ("state",)

    def __init__(self, *_: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


_RECORDS: dict[tuple[str, str], Any] = {
    (module, name): type(name, (_Record,), {"__slots__": ()})
    for module, names in _NAMES.items()
    for name in names.split()
} | {("torch", "Size"): tuple}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (record := _RECORDS.get((module, name))) is not None:
            return record
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise ValueError(f"it names {module[:100]}.{name[:100]}, which is no part of torch's metadata")


def read_metadata(directory: Path) -> Metadata:
    """What a ``torch_dist`` directory holds, and where. Files that it names lie there, and every tensor is whole.

    Raises:
        ValueError: the file is missing, damaged, or asks for anything but that.
    """
    directory = Path(directory)
    if not (directory / _FILE).exists():
        raise ValueError(f"{directory} is not a whole checkpoint: it has no {_FILE}; use another one.")
    data = read_bytes(directory / _FILE, _MAX_BYTES)
    try:
        return _checked(_Unpickler(io.BytesIO(data)).load(), directory)
    except Exception as error:  # a pickle can raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if not isinstance(error, ValueError | pickle.UnpicklingError | EOFError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"{directory / _FILE} is not the description of a checkpoint, and nothing of it was used ({reason}): use "
            "another checkpoint."
        ) from None


def _checked(root: Any, directory: Path) -> Metadata:
    """torch's own objects, from records."""
    fields = _state(root, "Metadata")
    tensors = {_text(key): _tensor(key, value) for key, value in _mapping(fields["state_dict_metadata"]).items()}
    places = {}
    for key, value in _mapping(fields["storage_data"]).items():
        index, place = _state(key, "MetadataIndex"), _state(value, "_StorageInfo")
        offset, hint = index.get("offset"), index.get("index")
        where = MetadataIndex(
            _text(index["fqn"]),
            None if offset is None else _sizes(offset),
            None if hint is None else _sizes((hint,))[0],
        )
        if place.get("transform_descriptors"):
            raise ValueError(f"{where.fqn} is stored in a form that is not read here")
        places[where] = _StorageInfo(_text(place["relative_path"]), *_sizes((place["offset"], place["length"])))
    sizes = {name: _file_size(directory, name) for name in {place.relative_path for place in places.values()}}
    for where, place in places.items():
        if place.offset + place.length > sizes[place.relative_path]:
            raise ValueError(f"{place.relative_path} ends before {where.fqn}")
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def _tensor(key: Any, value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(value).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _state(value, "TensorStorageMetadata")
    properties = _state(fields["properties"], "TensorProperties", tuple)
    size, dtype = _sizes(fields["size"]), properties[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has no dtype")
    chunks = []
    for chunk in fields["chunks"]:
        state = _state(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(state["offsets"]), _sizes(state["sizes"])
        if any(start + count > whole for start, count, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a part of {key} lies outside of it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    held = sum(math.prod(chunk.sizes) for chunk in chunks)
    if held != math.prod(size):
        raise ValueError(f"it holds {held} elements of {key}, which has {math.prod(size)}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _state(record: Any, name: str, kind: type = dict) -> Any:
    if type(record).__name__ != name or not isinstance(record.state, kind):
        raise ValueError(f"it has {type(record).__name__} where {name} belongs")
    return record.state


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"it has {type(value).__name__} where a mapping belongs")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"it has {type(value).__name__} where a name belongs")
    return value


def _sizes(value: Any) -> torch.Size:
    if not isinstance(value, tuple) or not all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        raise ValueError(f"it has {str(value)[:60]} where sizes belong")
    return torch.Size(value)


def _file_size(directory: Path, name: str) -> int:
    if Path(name).name != name or not (directory / name).is_file():
        raise ValueError(f"it names {name[:200]!r}, and there is no such file in {directory}")
    with (directory / name).open("rb") as file:
        if is_lfs_pointer(file.read(64)):
            raise ValueError(lfs_sentence(directory / name))
    return (directory / name).stat().st_size
