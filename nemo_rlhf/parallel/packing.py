"""Texts that share a row: which of them go together, and how megatron is told where each begins.

A row of packed texts holds no padding but the few tokens that sequence parallelism asks for. Attention stays within a
text and positions begin anew in each, so losses and gradients are those of texts in rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_rlhf import device
from nemo_rlhf.parallel.rotary import Rotation


def fill_rows(lengths: Sequence[int], capacity: int, multiple_of: int) -> list[list[int]]:
    """Indices of ``lengths`` by row, the longest first into the first row that has room (first-fit decreasing).

    Rows are then halved until their number is a ``multiple_of`` (ranks share them evenly), or each holds one text.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        row = next((row for row, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    while len(rows) % multiple_of and any(len(row) > 1 for row in rows):
        longest = max(rows, key=lambda row: (len(row) > 1, sum(lengths[index] for index in row)))
        rows.append([longest.pop() for _ in range(len(longest) // 2)])
    return rows


def join_row(tokens: Tensor, lengths: Tensor, rows: Sequence[int], multiple_of: int) -> tuple[Tensor, Tensor, Tensor]:
    """The given rows of host tensors [B, S] as one.

    Returns:
        tokens [1, T], T rounded up to ``multiple_of``; ``places`` [T less padding], their indices in the whole batch;
        ``bounds`` [texts + 1] int32, where each text begins and the last ends. Padding counts as a text.
    """
    parts = [row * tokens.size(1) + torch.arange(int(lengths[row])) for row in rows]
    places = torch.cat(parts)
    padding = -places.numel() % multiple_of
    joined = torch.nn.functional.pad(tokens.reshape(-1)[places], (0, padding))
    sizes = [part.numel() for part in parts] + ([padding] if padding else [])
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    return joined[None], places, bounds


@dataclass
class PackedTexts(PackedSeqParams):
    """What attention must know of a row of texts, ``cu_seqlens_q`` and the like on the device as megatron wants them.

    ``positions`` [1, T]: of tokens within their texts; ``sizes``: tokens of each text, on the host, so that no layer
    asks the device.
    """

    positions: Tensor | None = None
    sizes: tuple[int, ...] = ()
    _rotation: Rotation | None = None

    def rotation(self, angles: Tensor, dtype: torch.dtype, fused: bool) -> Rotation:
        """From all ``angles`` [longest text or more, 1, 1, channels]; made by the first layer for all."""
        if self._rotation is None:
            assert self.positions is not None
            self._rotation = Rotation(angles[self.positions[0]], dtype, fused)
        return self._rotation


def packed_texts(bounds: Tensor) -> PackedTexts:
    """Of ``join_row``'s host ``bounds``."""
    sizes = bounds.diff().long()
    starts = bounds[:-1].long().repeat_interleave(sizes)
    positions = (torch.arange(int(bounds[-1]), device="cpu") - starts)[None]
    to, longest = device.torch_device(), int(sizes.max())
    on_device = bounds.to(to)
    return PackedTexts(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        positions=positions.to(to),
        sizes=tuple(sizes.tolist()),
    )
