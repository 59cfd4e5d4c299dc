"""The heads of an ILQL model beside its exported trunk: what guides decoding, under names of their own.

``ilql_heads.safetensors`` holds V and the target Qs, without the vocabulary's padding; the Qs that learn stay behind.
"""

from __future__ import annotations

import math

import torch

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.mapping import Box, Shape
from nemo_rlhf.convert.torch_dist import Reader

STEM = "ilql_heads"
_PREFIX = f"{STEM}."


def head_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Every tensor of the heads, by its name in a checkpoint, without the vocabulary's padding."""
    if "ilql" not in architecture.heads:
        return {}
    hidden, width = architecture.hidden_size, architecture.ilql_head_width
    shapes: dict[str, Shape] = {"v.out.weight": (1, width), "v.out.bias": (1,)}
    heads = [f"{kind}.{number}" for kind in ("q", "target_q") for number in range(architecture.ilql_num_q)]
    for name in ("v", *heads):
        shapes |= {f"{name}.fc.weight": (width, hidden), f"{name}.fc.bias": (width,)}
    shapes |= {f"{name}.weight": (architecture.vocab_size, width) for name in heads}
    return {_PREFIX + name: shape for name, shape in shapes.items()}


def is_padded(name: str, found: Shape, expected: Shape) -> bool:
    """Whether ``found`` is the shape of a head's tensor ``name`` with rows of the vocabulary's padding."""
    of_vocabulary = name.endswith(".weight") and not name.endswith((".fc.weight", ".out.weight"))
    return of_vocabulary and found[1:] == expected[1:] and found[0] > expected[0]


class HeadsSource:
    """What guides decoding, as a source of weights."""

    def __init__(self, reader: Reader, architecture: Architecture, where: str) -> None:
        self.where, self._reader = where, reader
        names = {key.removeprefix(_PREFIX): shape for key, shape in head_shapes(architecture).items()}
        self._shapes = {name: shape for name, shape in names.items() if not name.startswith("q.")}

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.tensors[_PREFIX + name].dtype

    def read(self, name: str, box: Box) -> torch.Tensor:
        result = torch.empty([part.stop - part.start for part in box], dtype=self.dtype(name))
        if self._reader.read_into(result, _PREFIX + name, (), box) != math.prod(result.shape):
            raise ValueError(f"{self.where}: {_PREFIX}{name} has gaps or overlaps: use another checkpoint.")
        return result
