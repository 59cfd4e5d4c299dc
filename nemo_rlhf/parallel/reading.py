"""Reading a checkpoint through megatron-core, without running anything that its author wrote.

megatron-core and torch unpickle ``.metadata``, and what it calls objects, without limits, and leave the rest to
``torch.load``'s default, which the environment may change. Here is what they are given instead.
"""

from __future__ import annotations

import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import torch as megatron_strategies
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from nemo_rlhf.parallel.metadata import read_metadata
from nemo_rlhf.untrusted import read_json

COMMON = "common.pt"


def check(directory: Path) -> None:
    """Raises ValueError unless ``directory`` is of megatron-core's ``torch_dist`` format, and whole as far as its
    descriptions tell."""
    if not (directory / COMMON).is_file():
        raise ValueError(
            f"{directory} has no {COMMON}: it is damaged, or megatron-core 0.19 or newer wrote it, which older "
            "versions cannot read; check model.restore_from."
        )
    described = read_json(directory / "metadata.json")
    known = {field.name for field in fields(CheckpointingConfig)}
    if described.get("sharded_backend") != "torch_dist" or not described.keys() <= known:
        raise ValueError(f"{directory / 'metadata.json'} is not that of a torch_dist checkpoint: use another one.")
    read_metadata(directory)


class Reader(FileSystemReader):
    """torch's reader, with ``.metadata`` read as above and tensors only: anything else would be unpickled."""

    def __init__(self, path: str | Path, cache_metadata: bool = False) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Once: the file may be another one later."""
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path))
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise ValueError(f"{self.path} holds {item.storage_index.fqn} as an object where a tensor belongs")
        return super().read_data(plan, planner)


class TensorStrategy(TorchDistLoadShardedStrategy):
    """megatron-core's, with that reader in place of torch's."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        theirs = megatron_strategies._get_filesystem_reader
        megatron_strategies._get_filesystem_reader = Reader  # type: ignore[assignment]  # it takes none from outside
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        finally:
            megatron_strategies._get_filesystem_reader = theirs


class CommonStrategy(TorchCommonLoadStrategy):
    """megatron-core's, without what it does in an environment that switches torch's care off."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        return load_object(Path(checkpoint_dir) / COMMON, dict)


def load_object(file: Path, kind: type = object) -> Any:
    """Plain Python numbers, strings, containers and tensors out of a file. Raises ValueError where it holds others."""
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is damaged or holds other things than numbers, text and tensors, and nothing of it was used "
            f"({type(error).__name__}): use another checkpoint."
        ) from None
    if not isinstance(found, kind):
        raise ValueError(f"{file} holds {type(found).__name__}, not {kind.__name__}: use another checkpoint.")
    return found
