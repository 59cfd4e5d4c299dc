"""Where weights come from: files of a Hugging Face directory, or a random generator.

Every source answers to Hugging Face names and reads boxes, so that a rank holds only what it needs of a tensor.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.families import FAMILIES, weight_map
from nemo_rlhf.convert.files import Array
from nemo_rlhf.convert.mapping import Box, Entry, Shape
from nemo_rlhf.convert.safetensors_io import read_arrays
from nemo_rlhf.untrusted import is_lfs_pointer, lfs_sentence, read_json


class WeightSource(Protocol):
    """Tensors by Hugging Face name. ``where`` names the source in messages."""

    @property
    def where(self) -> str: ...

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The tensor's values in ``box``, on the CPU, in the stored dtype. May share memory with the source."""
        ...


_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)$")


def is_buffer(name: str) -> bool:
    """Rotary tables, and GPT-2's causal masks, that old checkpoints carry; they are no weights."""
    return _BUFFERS.search(name) is not None


class SafetensorsSource:
    """One ``.safetensors`` file or several; only the bytes of the asked boxes are read, and kept nowhere."""

    def __init__(self, files: Sequence[Path], where: str, index: Mapping[str, Path] | None = None) -> None:
        """``index``: the file of every tensor. Raises ValueError when a file is damaged, or files and index differ."""
        self.where = where
        self._arrays: dict[str, Array] = {}
        for path in files:
            for name, array in read_arrays(path, is_buffer).items():
                if name in self._arrays:
                    other = self._arrays[name].path.name
                    raise ValueError(f"{where} holds tensor {name} twice, in {other} and {path.name}: remove one.")
                if index is not None and name not in index:
                    raise ValueError(f"{path} holds tensor {name}, which the index does not name: download both again.")
                self._arrays[name] = array
        for name, path in (index or {}).items():
            if not is_buffer(name) and (name not in self._arrays or self._arrays[name].path != path):
                raise ValueError(f"{path} lacks tensor {name}, which the index places there: download the file again.")

    def names(self) -> tuple[str, ...]:
        return tuple(self._arrays)

    def shape(self, name: str) -> Shape:
        return self._arrays[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._arrays[name].dtype

    def read(self, name: str, box: Box) -> torch.Tensor:
        return self._arrays[name].read(box)

    def read_into(self, target: torch.Tensor, name: str, box: Box) -> None:
        """``read`` to a place in memory, of the box's shape and the stored dtype."""
        self._arrays[name].read_into(target, box)


class TorchSource:
    """``pytorch_model.bin``, one file or several, mapped into memory and never unpickled beyond plain tensors. What has
    been read of it counts as this process's memory until the system wants it back."""

    def __init__(self, files: list[Path], where: str) -> None:
        self.where, self._paths = where, files
        self._tensors: dict[str, torch.Tensor] = {}
        for path in files:
            for name, tensor in _unpickle(path).items():
                if name in self._tensors:
                    raise ValueError(f"{where} holds tensor {name} twice (again in {path.name}).")
                if is_buffer(name):
                    continue
                if not tensor.is_floating_point():
                    raise ValueError(
                        f"{path}: tensor {name} is stored as {tensor.dtype}; floating-point weights are needed."
                    )
                self._tensors[name] = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return TorchSource, (self._paths, self.where)  # another process maps the files, rather than be sent all weights

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, box: Box) -> torch.Tensor:
        return self._tensors[name][box]


def _unpickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        loaded = None
    except (RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged ({reason}): download or copy it again.") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{path} holds other things than tensors and is refused: save the model as safetensors.")
    return loaded


@dataclass(frozen=True)
class TrunkSource:
    """A checkpoint of a trunk without heads (the released GPT-2), whose names lack the trunk's own before them."""

    source: WeightSource
    prefix: str

    @property
    def where(self) -> str:
        return self.source.where

    def names(self) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in self.source.names())

    def shape(self, name: str) -> Shape:
        return self.source.shape(name.removeprefix(self.prefix))

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name.removeprefix(self.prefix))

    def read(self, name: str, box: Box) -> torch.Tensor:
        return self.source.read(name.removeprefix(self.prefix), box)


def _with_trunk_name(source: WeightSource) -> WeightSource:
    for embedding in {family.embedding for family in FAMILIES}:
        trunk, name = embedding.split(".", 1)
        if name in source.names():
            return TrunkSource(source, f"{trunk}.")
    return source


class RandomSource:
    """Fresh weights of an architecture: each tensor is a pure function of (seed, its name), whatever the TP or PP size.

    Matrices are normal with standard deviation ``initializer_range``; projections into the residual stream are narrowed
    by 1/sqrt(2 * num_layers) (GPT-2, Radford et al. 2019); norms are one.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        self.where = f"random weights (seed {seed})"
        self._weights = weight_map(architecture)
        self._architecture, self._seed = architecture, seed
        # one tensor is kept: its boxes are asked for one after the other
        self._whole = functools.lru_cache(maxsize=1)(self._make)

    def names(self) -> tuple[str, ...]:
        return tuple(self._weights.tensors)

    def shape(self, name: str) -> Shape:
        return self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._architecture.dtype)

    def read(self, name: str, box: Box) -> torch.Tensor:
        return self._whole(name)[box]

    def _make(self, name: str) -> torch.Tensor:
        entry, number = self._weights.tensors[name]
        shape = entry.shapes[number]
        if entry.row.initial in ("ones", "zeros"):
            return torch.full(shape, 1.0 if entry.row.initial == "ones" else 0.0, dtype=self.dtype(name))
        return (normal(name, self._seed, shape) * self._deviation(entry)).to(self.dtype(name))

    def _deviation(self, entry: Entry) -> float:
        deviation = self._architecture.initializer_range
        return deviation / (2 * self._architecture.num_layers) ** 0.5 if entry.row.initial == "residual" else deviation


def normal(name: str, seed: int, shape: Shape) -> torch.Tensor:
    """Standard normal fp32 values that depend on (seed, name) and nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def open_hf(directory: Path) -> WeightSource:
    """The weights of a Hugging Face directory: safetensors if there, else ``pytorch_model.bin``.

    Raises ValueError when there are none, a file is missing or damaged, or one tensor is there twice.
    """
    directory, where = Path(directory), str(directory)
    places = _placed(directory)
    files = _files(directory, places)
    if not files:
        raise ValueError(
            f"{directory} has no weights: neither model.safetensors nor pytorch_model.bin, single or sharded."
        )
    for file in files:
        if not file.is_file():
            index = weight_files(directory)[0].name
            raise ValueError(f"{file} is missing, although {index} names it: download it again.")
        if _is_pointer(file):
            raise ValueError(lfs_sentence(file))
    if files[0].suffix == ".safetensors":
        return _with_trunk_name(SafetensorsSource(files, where, places))
    return _with_trunk_name(TorchSource(files, where))


def present_files(directory: Path) -> list[Path]:
    """The files that hold a Hugging Face directory's weights; nothing where one of them is yet to be fetched.

    Raises ValueError when there are two models, or the index is none.
    """
    files = _files(directory, _placed(directory))
    return files if all(file.is_file() and not _is_pointer(file) for file in files) else []


def _files(directory: Path, places: Mapping[str, Path] | None) -> list[Path]:
    return weight_files(directory) if places is None else sorted(set(places.values()))


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return is_lfs_pointer(stream.read(64))


def weight_files(directory: Path) -> list[Path]:
    """The file of weights in a Hugging Face directory, or their index; nothing where there are none.

    Raises ValueError when there are both.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        found = [path for path in (directory / name, directory / f"{name}.index.json") if path.is_file()]
        if len(found) == 2:
            raise ValueError(
                f"{directory} holds {found[0].name} and {found[1].name}, which are two models: remove one."
            )
        if found:
            return found
    return []


def _placed(directory: Path) -> dict[str, Path] | None:
    """The file of each tensor by the directory's index; None without one."""
    found = weight_files(directory)
    if not found or found[0].suffix != ".json":
        return None
    index = found[0]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} is not an index of weight files: download it again.")
    for file in sorted(set(places.values())):
        if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{index} names {file[:200]!r}, which is no weight file beside it: download it again.")
    return {name: directory / file for name, file in places.items()}
