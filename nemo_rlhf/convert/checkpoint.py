"""A Megatron checkpoint as a source of Hugging Face tensors, read piece by piece without building a model.

megatron-core's ``torch_dist`` is torch's distributed checkpoint; its tensors are whole, whatever the layout that wrote
them, so a family's table at tensor-parallel size 1 says where each Hugging Face tensor lies.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.families import weight_map
from nemo_rlhf.convert.mapping import Box, Cut, Entry, Shape, Vocabulary

WEIGHTS = "weights"
_LAYERS = "decoder.layers."
# where Transformer Engine's fused layers keep the norms; megatron-core writes these names whatever built the model
_FUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class _Into(LoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        place = self._target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(dimension, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("plans are made by CheckpointSource")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]


class CheckpointSource:
    """The language model of a Megatron checkpoint under its Hugging Face names."""

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        """Raises ValueError when the weights are missing, damaged or not those of ``architecture``."""
        self.where = str(directory)
        self._weights = weight_map(architecture)
        self._reader = FileSystemReader(Path(directory) / WEIGHTS)
        try:
            metadata = self._reader.read_metadata()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            reason = type(error).__name__
            raise ValueError(f"{directory}/{WEIGHTS} is not a whole checkpoint ({reason}): use another one.") from None
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        tensors = metadata.state_dict_metadata
        self._stored = {key: value for key, value in tensors.items() if isinstance(value, TensorStorageMetadata)}
        self.check()

    def check(self) -> None:
        """Raises ValueError unless the checkpoint's tensors are exactly those of the table, plus heads."""
        known = set()
        for entry in self._weights.entries.values():
            key, layer = self._locate(entry)
            known.add(key)
            expected = entry.local_shape(self._cut())
            if layer is not None:
                expected = (self._weights.architecture.num_layers, *expected)
            found = tuple(self._stored[key].size)
            padded = isinstance(entry.row.layout, Vocabulary) and found[0] > expected[0]
            if found[1:] != expected[1:] or (found[0] != expected[0] and not padded):
                raise ValueError(
                    f"{self.where}: {key} has shape {list(found)}, but its model_config.yaml says {list(expected)}."
                )
        unknown = sorted(key for key in self._stored if key not in known and not key.startswith("value_head."))
        if unknown:
            raise ValueError(f"{self.where} has {unknown[0]}, which its model_config.yaml has no place for.")

    def _cut(self) -> Cut:
        return Cut(rank=0, size=1, padded_vocab_size=self._weights.architecture.vocab_size)

    def _locate(self, entry: Entry) -> tuple[str, int | None]:
        """Key of the stored tensor, and the layer's place in it where the layers are stacked."""
        name = entry.megatron
        if not name.startswith(_LAYERS):
            candidates: list[tuple[str, int | None]] = [(name, None)]
        else:
            layer, parameter = name.removeprefix(_LAYERS).split(".", 1)
            candidates = []
            for alias in (parameter, _FUSED.get(parameter, parameter)):
                candidates += [(f"{_LAYERS}{alias}", int(layer)), (f"{_LAYERS}{layer}.{alias}", None)]
        for key, index in candidates:
            if key in self._stored:
                return key, index
        raise ValueError(f"{self.where} lacks {name}: it is not a whole checkpoint of its model_config.yaml.")

    def names(self) -> tuple[str, ...]:
        return tuple(self._weights.tensors)

    def shape(self, name: str) -> Shape:
        return self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        key, _ = self._locate(self._weights.tensors[name][0])
        return self._stored[key].properties.dtype

    def read(self, name: str, box: Box) -> torch.Tensor:
        entry, number = self._weights.tensors[name]
        result = torch.empty([part.stop - part.start for part in box], dtype=self.dtype(name))
        for piece in entry.pieces(self._cut()):
            if piece.tensor != number:
                continue
            common = [(max(o.start, b.start), min(o.stop, b.stop)) for o, b in zip(piece.outside, box, strict=True)]
            if all(start < stop for start, stop in common):
                spans = list(zip(common, piece.outside, piece.inside, strict=True))
                stored = tuple(slice(a - o.start + i.start, b - o.start + i.start) for (a, b), o, i in spans)
                place = tuple(slice(a - b.start, z - b.start) for (a, z), b in zip(common, box, strict=True))
                self._read_into(result[place], entry, stored)
        return result

    def _read_into(self, target: torch.Tensor, entry: Entry, box: Box) -> None:
        key, layer = self._locate(entry)
        offsets = [part.start for part in box]
        lengths = [part.stop - part.start for part in box]
        if layer is not None:
            offsets, lengths, target = [layer, *offsets], [1, *lengths], target.unsqueeze(0)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(lengths))
        items = create_read_items_for_chunk_list(key, self._stored[key], [chunk])
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
