"""Where weights come from: files of a Hugging Face directory, or a random generator.

Every source answers to Hugging Face names and reads boxes, so that a rank holds only what it needs of a tensor.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.families import weight_map
from nemo_rlhf.convert.mapping import Box, Entry, Shape

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class WeightSource(Protocol):
    """Tensors by Hugging Face name. ``where`` names the source in messages."""

    where: str

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The tensor's values in ``box``, on the CPU, in the stored dtype. May share memory with the source."""
        ...


def is_buffer(name: str) -> bool:
    """Rotary tables that old checkpoints carry; they follow from the configuration and are not weights."""
    return name.endswith("rotary_emb.inv_freq")


class SafetensorsSource:
    """One ``.safetensors`` file or several; only the bytes of the asked boxes are read (files are mapped)."""

    def __init__(self, files: dict[str, Path], where: str) -> None:
        """``files``: tensor name -> file. Raises ValueError when a file is damaged or lacks a tensor."""
        self.where = where
        self._handles = {path: _open(path) for path in sorted(set(files.values()))}
        held = {path: set(handle.keys()) for path, handle in self._handles.items()}
        for name, path in files.items():
            if name not in held[path]:
                raise ValueError(f"{path} lacks tensor {name}, which the index places there: download the file again.")
        self._files = {name: path for name, path in files.items() if not is_buffer(name)}

    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def _slice(self, name: str) -> Any:
        return self._handles[self._files[name]].get_slice(name)

    def shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{self.where}: tensor {name} is stored as {stored}; floating-point weights are needed.")
        return _SAFETENSORS_DTYPES[stored]

    def read(self, name: str, box: Box) -> torch.Tensor:
        return self._slice(name)[box]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): download or copy it again.") from None


class TorchSource:
    """``pytorch_model.bin``, one file or several, mapped into memory and never unpickled beyond plain tensors."""

    def __init__(self, files: list[Path], where: str) -> None:
        self.where = where
        self._tensors: dict[str, torch.Tensor] = {}
        for path in files:
            for name, tensor in _unpickle(path).items():
                if name in self._tensors:
                    raise ValueError(f"{where} holds tensor {name} twice (again in {path.name}).")
                if not is_buffer(name):
                    self._tensors[name] = tensor

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

    Raises ValueError when there are none or a file is missing or damaged.
    """
    directory, where = Path(directory), str(directory)
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if index.is_file():
        return SafetensorsSource(_indexed(index), where)
    if single.is_file():
        return SafetensorsSource(dict.fromkeys(_open(single).keys(), single), where)
    single, index = directory / "pytorch_model.bin", directory / "pytorch_model.bin.index.json"
    if index.is_file():
        return TorchSource(sorted(set(_indexed(index).values())), where)
    if single.is_file():
        return TorchSource([single], where)
    raise ValueError(f"{directory} has no weights: neither model.safetensors nor pytorch_model.bin, single or sharded.")


def _indexed(index: Path) -> dict[str, Path]:
    try:
        files = {name: index.parent / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (json.JSONDecodeError, KeyError, AttributeError):
        raise ValueError(f"{index} is not an index of weight files: download it again.") from None
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise ValueError(f"{path} is missing, although {index.name} names it: download it again.")
    return files
