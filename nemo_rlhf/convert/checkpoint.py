"""A Megatron checkpoint as a source of Hugging Face tensors, read piece by piece without building a model.

megatron-core's tensors are whole, whatever the layout that wrote them, so a family's table at tensor-parallel size 1
says where each Hugging Face tensor lies.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.families import weight_map
from nemo_rlhf.convert.files import common, moved, within
from nemo_rlhf.convert.ilql_heads import HeadsSource, head_shapes, is_padded
from nemo_rlhf.convert.keys import Place, candidates
from nemo_rlhf.convert.mapping import Box, Cut, Entry, Shape, Vocabulary
from nemo_rlhf.convert.torch_dist import Reader

WEIGHTS = "weights"
VALUE_TRUNK = "value_trunk."  # that of an ILQL model's heads, where it is their own


class CheckpointSource:
    """The model of a Megatron checkpoint under its Hugging Face names."""

    def __init__(self, directory: Path, architecture: Architecture, prefix: str = "") -> None:
        """``prefix``: of the names of a part of the checkpoint's model, whose ``architecture`` is given.

        Raises:
            ValueError: the weights are missing, damaged or not those of ``architecture``.
        """
        self.where, self.architecture, self._prefix = str(directory), architecture, prefix
        self.value_trunk: CheckpointSource | None = None
        if architecture.ilql_value_trunk:
            trunk = replace(architecture, heads=("trunk",), ilql_value_trunk=False)
            self.value_trunk = CheckpointSource(directory, trunk, VALUE_TRUNK)
        self._weights = weight_map(architecture)
        self._reader = Reader(Path(directory) / WEIGHTS)
        self._cut = Cut(rank=0, size=1, padded_vocab_size=architecture.vocab_size)
        self._places = {entry.megatron: self._locate(entry) for entry in self._weights.entries.values()}
        self.check()

    def check(self) -> None:
        """Raises ValueError unless the checkpoint's tensors are exactly those of the table."""
        for entry in self._weights.entries.values():
            place = self._places[entry.megatron]
            expected = (*place.sizes, *entry.local_shape(self._cut))
            found = self._reader.tensors[place.key].shape
            padded = isinstance(entry.row.layout, Vocabulary) and found[0] > expected[0]
            if found[1:] != expected[1:] or (found[0] != expected[0] and not padded):
                raise ValueError(
                    f"{self.where}: {place.key} has shape {list(found)}, but its model_config.yaml says "
                    f"{list(expected)}."
                )
        heads = head_shapes(self._weights.architecture)
        for key, shape in heads.items():
            if key not in self._reader.tensors:
                raise ValueError(f"{self.where} lacks {key}: it is not a whole checkpoint of its model_config.yaml.")
            found = self._reader.tensors[key].shape
            if found != shape and not is_padded(key, found, shape):
                raise ValueError(
                    f"{self.where}: {key} has shape {list(found)}, but its model_config.yaml says {list(shape)}."
                )
        known = {place.key for place in self._places.values()} | heads.keys()
        if self.value_trunk is not None:
            known |= {place.key for place in self.value_trunk._places.values()}
        unknown = sorted(key for key in self._reader.tensors if key not in known and key.startswith(self._prefix))
        if unknown:
            raise ValueError(f"{self.where} has {unknown[0]}, which its model_config.yaml has no place for.")

    def heads(self) -> HeadsSource:
        """V and target Q heads of an ILQL model, nothing in a model without."""
        return HeadsSource(self._reader, self._weights.architecture, self.where)

    def _locate(self, entry: Entry) -> Place:
        for place in candidates(self._weights.architecture, entry.megatron):
            place = place._replace(key=self._prefix + place.key)
            if place.key in self._reader.tensors:
                return place
        name = self._prefix + entry.megatron
        raise ValueError(f"{self.where} lacks {name}: it is not a whole checkpoint of its model_config.yaml.")

    def names(self) -> tuple[str, ...]:
        return tuple(self._weights.tensors)

    def shape(self, name: str) -> Shape:
        return self._weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        entry, _ = self._weights.tensors[name]
        return self._reader.tensors[self._places[entry.megatron].key].dtype

    def read(self, name: str, box: Box) -> torch.Tensor:
        entry, number = self._weights.tensors[name]
        place = self._places[entry.megatron]
        transposed = entry.row.layout.transposed
        result = torch.empty([part.stop - part.start for part in box], dtype=self.dtype(name))
        filled = 0
        for piece in entry.pieces(self._cut):
            if piece.tensor == number and (shared := common(piece.outside, box)) is not None:
                target = result[within(shared, box)]
                if transposed:
                    stored = moved(shared[::-1], piece.outside[::-1], piece.inside)
                    filled += self._reader.read_into(target.T, place.key, place.leading, stored)
                else:
                    stored = moved(shared, piece.outside, piece.inside)
                    filled += self._reader.read_into(target, place.key, place.leading, stored)
        if filled != math.prod(result.shape):
            raise ValueError(f"{self.where}: {place.key} has gaps or overlaps: use another checkpoint.")
        return result
