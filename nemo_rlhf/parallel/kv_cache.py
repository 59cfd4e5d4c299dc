"""Keys and values of sequences that are being generated, in slots whose lengths are their own.

megatron-core's static inference context shares one offset among all rows. Here every row has its own position, so that
finished sequences are replaced one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from torch import Tensor

from nemo_rlhf.parallel.rotary import Rotation


class KVCache(BaseInferenceContext):
    """Keys (rotated) and values of ``num_slots`` sequences, one pair of tensors a layer, allocated at first use.

    Call ``prefill``, ``decode`` or ``append`` before each forward pass: it says what the pass computes. The first two
    cover slots that lie side by side, so that attention reads a slice of the cache; ``move`` closes the gaps that
    others leave.
    """

    def __init__(self, num_slots: int, max_sequence_length: int) -> None:
        # megatron's __init__, of other arguments from 0.17 on, keeps what is asked of logits: a GPT makes none
        self.num_slots = num_slots
        self.max_sequence_length = max_sequence_length
        self._layers: dict[Any, tuple[Tensor, Tensor]] = {}
        self._slots: slice | Tensor = slice(0)
        self._positions: Tensor | None = None  # [n, S]; None in a prefill
        # of the tokens that are no padding: their slots, their positions, and where they are in the flattened pass
        self._written: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._num_keys = self._max_position = 0
        self._masks: dict[int | None, Tensor] = {}
        self._rotation: Rotation | None = None

    def is_static_batching(self) -> bool:
        return True

    def is_decode_only(self) -> bool:
        return self._positions is not None

    def prefill(self, first_slot: int, num_rows: int) -> None:
        """The next forward runs tokens [n, S], right-padded, from position 0; its first ``num_rows`` rows go into slots
        from ``first_slot`` on, and what other rows compute is forgotten."""
        assert first_slot + num_rows <= self.num_slots
        self._slots = slice(first_slot, first_slot + num_rows)
        self._positions = self._rotation = None

    def decode(self, positions: Tensor, max_position: int) -> None:
        """The next forward runs tokens [n, 1] of the first n slots at ``positions`` [n]; each attends up to itself.
        ``max_position`` is the largest of them, which the host knows without asking the device."""
        self._slots = slice(positions.size(0))
        self._written = torch.arange(positions.size(0), device=positions.device), positions, None
        self._attend(positions[:, None], max_position)

    def append(self, slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int], where: torch.device) -> None:
        """The next forward runs tokens [n, S], right-padded, of ``slots``: ``lengths`` of them, from positions
        ``starts`` on; each attends up to itself, to what the slot holds already too."""
        tokens = [
            (slot, start + place, row * max(lengths) + place)
            for row, (slot, start, length) in enumerate(zip(slots, starts, lengths, strict=True))
            for place in range(length)
        ]
        slot, position, flat = torch.tensor(tokens, device=where).unbind(1)
        self._slots, self._written = torch.tensor(slots, device=where), (slot, position, flat)
        positions = position.new_zeros(len(slots) * max(lengths))  # padding attends to the first token
        positions[flat] = position
        self._attend(positions.view(len(slots), -1), max(map(sum, zip(starts, lengths, strict=True))) - 1)

    def _attend(self, positions: Tensor, max_position: int) -> None:
        assert max_position < self.max_sequence_length
        self._positions, self._rotation = positions, None
        # what fused kernels ask of a mask's stride
        self._num_keys = min(-(-(max_position + 1) // 8) * 8, self.max_sequence_length)
        self._max_position, self._masks = max_position, {}

    def mask(self, window: int | None) -> Tensor | None:
        """What a layer adds to the scores [n, 1, S, keys], None in a prefill. ``window``: how many tokens one sees in
        this layer, itself included; None for all."""
        if self._positions is None:
            return None
        if window is not None and window > self._max_position:
            window = None
        if window not in self._masks:
            positions = self._positions[:, None, :, None]
            keys = torch.arange(self._num_keys, device=positions.device)
            hidden = keys > positions
            if window is not None:
                hidden |= keys <= positions - window
            # made once a step, where a boolean mask would be converted by every layer
            bias = torch.zeros(hidden.shape, device=positions.device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = bias
        return self._masks[window]

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Give sequences other slots: (from, to); what was in the latter is overwritten."""
        if not moves:
            return
        for pair in self._layers.values():
            sources, targets = torch.tensor(moves, device=pair[0].device).unbind(1)
            for tensor in pair:
                tensor[targets] = tensor[sources]

    def rotation(self, angles: Tensor, length: int, dtype: torch.dtype, fused: bool) -> Rotation:
        """Of this pass, from all ``angles`` [max length, 1, 1, channels]; made by the first layer for all."""
        if self._rotation is None:
            rows = angles[:length] if self._positions is None else angles[:, 0][self._positions.t()]
            self._rotation = Rotation(rows, dtype, fused)
        return self._rotation

    def store(self, layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write this pass's key and value [S, n, groups, channels] of a layer (its module: a model of two trunks has
        each number twice); return what its queries attend to, in the same form."""
        keys, values = self._layer(layer, key)
        if self._positions is None:
            length = key.size(0)
            rows = self._slots.stop - self._slots.start  # type: ignore[union-attr]
            keys[self._slots, :, :length] = key[:, :rows].permute(1, 2, 0, 3)
            values[self._slots, :, :length] = value[:, :rows].permute(1, 2, 0, 3)
            return key, value
        assert self._written is not None
        slots, positions, flat = self._written
        for cache, new in ((keys, key), (values, value)):
            tokens = new.transpose(0, 1).flatten(0, 1)
            cache[slots, :, positions] = tokens if flat is None else tokens[flat]
        keys, values = keys[self._slots, :, : self._num_keys], values[self._slots, :, : self._num_keys]
        return keys.permute(2, 0, 1, 3), values.permute(2, 0, 1, 3)

    def _layer(self, layer: Any, key: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's (keys, values), each [slots, groups, max length, channels]."""
        if layer not in self._layers:
            shape = (self.num_slots, key.size(2), self.max_sequence_length, key.size(3))
            self._layers[layer] = (key.new_zeros(shape), key.new_zeros(shape))
        return self._layers[layer]
