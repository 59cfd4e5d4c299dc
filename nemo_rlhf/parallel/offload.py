"""What is idle on the device waits in host memory, pinned where there is CUDA.

Whole storages are moved, so every view (megatron's parameters are views of one buffer) stays valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf import device


def _storages(tensors: Iterable[Tensor]) -> list[Any]:
    unique = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return [storage for storage in unique.values() if storage.nbytes()]


def _bytes(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_like(storages: Iterable[Any]) -> list[Tensor]:
    return [device.pinned_empty(s.nbytes()) for s in storages]


def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for a, b in zip(source, target, strict=True):
        b.copy_(a, non_blocking=True)
    device.synchronize()


class Offload:
    """Tensors that leave the device and come back. ``keep`` are tensors whose storage must stay where it is."""

    def __init__(self, tensors: Iterable[Tensor], keep: Iterable[Tensor] = ()) -> None:
        kept = {t.untyped_storage()._cdata for t in keep}
        self._storages = [s for s in _storages(tensors) if s._cdata not in kept]
        self._sizes = [s.nbytes() for s in self._storages]
        self._host = _host_like(self._storages)
        self.is_out = False

    def out(self) -> None:
        """Copy to the host and free the device memory; the tensors must not be used until ``back``."""
        assert not self.is_out
        _copy(map(_bytes, self._storages), self._host)
        for storage in self._storages:
            storage.resize_(0)
        self.is_out = True

    def back(self) -> None:
        assert self.is_out
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)
        _copy(self._host, map(_bytes, self._storages))
        self.is_out = False


class Backup:
    """What tensors hold when this is made, kept on the host."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages = _storages(tensors)
        self._kept = _host_like(self._storages)
        _copy(map(_bytes, self._storages), self._kept)

    def restore(self) -> None:
        _copy(self._kept, map(_bytes, self._storages))


class Swap:
    """A second set of weights for one module, kept on the host: those that it has when this is made."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._storages = _storages(tensors)
        self._kept = _host_like(self._storages)
        self._others = _host_like(self._storages)
        _copy(map(_bytes, self._storages), self._kept)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the kept weights inside, and its own again afterwards."""
        _copy(map(_bytes, self._storages), self._others)
        _copy(self._kept, map(_bytes, self._storages))
        try:
            yield
        finally:
            _copy(self._others, map(_bytes, self._storages))
