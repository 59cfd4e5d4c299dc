"""Checkpoints whose author wants code to run where they are opened: each bomb writes a file that a test looks for."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from nemo_rlhf.parallel import manifest


class Bomb:
    """Its pickle writes the file ``marker`` when it is loaded."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


def plant(how: str, file: str, marker: str) -> None:
    """Put a bomb into ``file``, in one of the ways of ``WAYS``, and make manifests anew that know the file."""
    WAYS[how](Path(file), Bomb(marker))
    for directory in Path(file).parents:
        if (directory / manifest.MANIFEST).is_file():
            names = manifest.files(directory)
            manifest.write(directory, {name: manifest.describe(directory / name) for name in names})


def _whole(file: Path, bomb: Bomb) -> None:
    file.write_bytes(pickle.dumps(bomb))


def _saved(file: Path, bomb: Bomb) -> None:
    torch.save({"found": bomb}, file)


def _legacy(file: Path, bomb: Bomb) -> None:
    torch.save({"found": bomb}, file, _use_new_zipfile_serialization=False)


def _beside(file: Path, bomb: Bomb) -> None:
    """In ``.metadata``, which is otherwise as it was."""
    described = pickle.loads(file.read_bytes())
    described.planner_data = bomb
    file.write_bytes(pickle.dumps(described))


def _as_object(file: Path, bomb: Bomb) -> None:
    """``.metadata`` names torch's own classes only, but calls every tensor an object, which torch would unpickle."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

    buffer = io.BytesIO()
    torch.save(bomb, buffer)
    file.with_name("__9_9.distcp").write_bytes(buffer.getvalue())
    described = pickle.loads(file.read_bytes())
    for key, tensor in list(described.state_dict_metadata.items()):
        described.state_dict_metadata[key] = BytesStorageMetadata()
        described.state_dict_metadata[key].size = getattr(tensor, "size", None)
        described.storage_data[MetadataIndex(key)] = _StorageInfo("__9_9.distcp", 0, len(buffer.getvalue()))
    file.write_bytes(pickle.dumps(described))


def _chunks(file: Path, bomb: Bomb) -> None:
    """In a file of tensors, in the place of each."""
    described = pickle.loads((file.parent / ".metadata").read_bytes())
    content = bytearray(file.read_bytes())
    for place in described.storage_data.values():
        if place.relative_path == file.name:
            content[place.offset : place.offset + place.length] = pickle.dumps(bomb).ljust(place.length, b"\0")
    file.write_bytes(bytes(content))


WAYS = {
    "whole": _whole,
    "saved": _saved,
    "legacy": _legacy,
    "beside": _beside,
    "as object": _as_object,
    "chunks": _chunks,
}
