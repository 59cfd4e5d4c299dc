"""Attention by ``scaled_dot_product_attention``, with a key-value cache whose slots have lengths of their own.

megatron-core's local core attention materialises the score matrix, and its static inference context shares one offset
among all rows. Here the core runs torch's fused kernels (grouped-query heads, causal, masked, packed), and ``KVCache``
gives every row its own position, so that finished sequences are replaced one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from nemo_rlhf.parallel.elementwise import rotate
from nemo_rlhf.parallel.short_attention import LONGEST, short_attention


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
        self._rotation: tuple[Tensor, Tensor] | None = None

    def is_static_batching(self) -> bool:
        return True

    def is_decode_only(self) -> bool:
        return self._positions is not None

    def prefill(self, first_slot: int, num_rows: int) -> None:
        """The next forward runs tokens [n, S], right-padded, from position 0 into ``num_rows`` slots."""
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

    def rotation(self, angles: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of this pass for ``rotate``, from all ``angles`` [max length, 1, 1, channels]; computed by
        the first layer for all."""
        if self._rotation is None:
            rows = angles[:length] if self._positions is None else angles[:, 0][self._positions.t()]
            self._rotation = _cos_sin(rows, dtype)
        return self._rotation

    def store(self, layer: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write this pass's key and value [S, n, groups, channels] of a layer (its module: a model of two trunks has
        each number twice); return what its queries attend to, in the same form."""
        keys, values = self._layer(layer, key)
        if self._positions is None:
            length = key.size(0)
            keys[self._slots, :, :length] = key.permute(1, 2, 0, 3)
            values[self._slots, :, :length] = value.permute(1, 2, 0, 3)
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


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """How many tokens one sees in this layer (counted from 1), itself included; None for all before it."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    assert config.window_size is not None
    return config.window_size[0] + 1


class CachedSelfAttention(SelfAttention):
    """megatron's self-attention, which keeps rotated keys in a ``KVCache`` instead of rotating all of them anew.

    Rotates queries and keys itself, in fewer passes; packed sequences are left to megatron, which knows their starts.

    ``trims_queries``: with a mask (see ``later_queries``) it answers the queries of that mask only. That is for a
    model's last layer, where nobody reads the rest; the other layers take no notice of such a mask.
    """

    trims_queries = False
    _is_packed = False
    _first_query = 0

    def __init__(
        self, config: TransformerConfig, submodules: Any, layer_number: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.window = window_of(config, layer_number)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._is_packed = kwargs.get("packed_seq_params") is not None
        self._first_query = 0
        mask, kwargs["attention_mask"] = kwargs["attention_mask"], None
        context, angles = kwargs.get("inference_context"), kwargs.get("rotary_pos_emb")
        if self.trims_queries and mask is not None:
            self._first_query = mask.size(3) - mask.size(2)
            kwargs["attention_mask"] = within_window(mask, self.window)
        elif isinstance(context, KVCache):
            kwargs["attention_mask"] = context.mask(self.window)
        if context is None and angles is not None and self._is_short(hidden_states, angles.size(0)):
            return self._forward_short(hidden_states, angles)
        return super().forward(hidden_states, *args, **kwargs)

    def _is_short(self, hidden_states: Tensor, length: int) -> bool:
        return (
            length <= min(LONGEST, self.window or LONGEST)
            and not (hidden_states.is_cuda or self._is_packed or self.config.qk_layernorm)
            and hidden_states.dtype == torch.float32
        )

    def _forward_short(self, hidden_states: Tensor, angles: Tensor) -> tuple[Tensor, Tensor | None]:
        mixed, _ = self.linear_qkv(hidden_states)
        channels = self.hidden_size_per_attention_head
        mixed = mixed.view(*mixed.shape[:2], self.num_query_groups_per_partition, -1, channels)
        cos, sin = (part.unsqueeze(3) for part in _cos_sin(angles, mixed.dtype))
        attend = functools.partial(short_attention, scale=1 / math.sqrt(channels), first=self._first_query)
        if self.checkpoint_core_attention and self.training:
            context = checkpoint(attend, False, mixed, cos, sin)
        else:
            context = attend(mixed, cos, sin)
        answer: tuple[Tensor, Tensor | None] = self.linear_proj(context)
        return answer

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kw: Any,
    ) -> Any:
        if self._first_query:
            query = query[self._first_query :]
        if inference_context is None and not self._is_packed:
            if rotary_pos_emb is not None:
                query, key = self._rotate(query, key, *_cos_sin(rotary_pos_emb[0], key.dtype))
            return query, key, value, None, self.attn_mask_type, None
        if not isinstance(inference_context, KVCache):
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kw
            )
        if rotary_pos_emb is not None:
            rotation = inference_context.rotation(rotary_pos_emb[0], key.size(0), key.dtype)
            query, key = self._rotate(query, key, *rotation)
        key, value = inference_context.store(self, key, value)
        mask_type = AttnMaskType.no_mask if inference_context.is_decode_only() else AttnMaskType.causal
        return query, key, value, None, mask_type, None

    def _rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(query, cos[self._first_query :], sin[self._first_query :]), rotate(key, cos, sin)


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = angles[..., : angles.size(-1) // 2]  # both halves hold the same angles
    return half.cos().to(dtype), half.sin().to(dtype)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, masked: Tensor | None, causal: bool, scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention of [S, B, heads, channels] queries over [T, B, groups, channels]; returns [S, B, heads * channels].
    ``masked`` broadcasts to [B, heads, S, T]: True where a key is hidden, or numbers to add to the scores."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if q.size(2) == 1 and not causal and (masked is None or masked.size(1) == 1):
        # one query a head: those of a group become a sequence, which reads their key and value heads once
        q = q.reshape(q.size(0), k.size(1), -1, q.size(3))
    if masked is not None:
        masked = ~masked if masked.dtype == torch.bool else masked.to(q.dtype)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=masked,
        is_causal=causal,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q.size(1) != k.size(1),
    )
    if q.size(2) != query.size(0):
        return out.reshape(1, query.size(1), -1)
    return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)


def later_queries(first: int, length: int, device: torch.device) -> Tensor:
    """The causal mask of the places from ``first`` on: True [1, 1, S - first, S] where a key is hidden."""
    places = torch.arange(length, device=device)
    return (places > places[first:, None])[None, None]


def within_window(masked: Tensor, window: int | None) -> Tensor:
    """A causal mask [1, 1, queries, keys] whose last query sees the last key, with each seeing ``window`` tokens only,
    itself included."""
    if window is None or masked.size(3) <= window:
        return masked
    keys = torch.arange(masked.size(3), device=masked.device)
    return masked | (keys <= keys[-masked.size(2) :, None] - window)


def add_to_last_rows(training: bool, fused: bool) -> Callable[..., Tensor]:
    """megatron's bias, dropout and residual behind an attention that may have answered the last places only."""
    add = get_bias_dropout_add(training, fused)

    def add_them(answer: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        rows = answer[0].size(0)
        return add(answer, residual if rows == residual.size(0) else residual[-rows:], dropout)

    return add_them


class SDPACoreAttention(MegatronModule):
    """Drop-in for megatron's DotProductAttention. Causal without a mask is the fast path: right-padded batches need
    none, nor do those that are shorter than the layer's window. With a boolean mask (True = masked) the mask alone
    decides; packed sequences (thd) keep to themselves."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.window = window_of(config, layer_number)
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            return self._packed(query, key, value, packed_seq_params)
        mask_type = attn_mask_type or self.attn_mask_type
        causal = mask_type == AttnMaskType.causal and attention_mask is None and query.size(0) > 1
        return self._attend(query, key, value, attention_mask, causal)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, masked: Tensor | None, causal: bool) -> Tensor:
        if causal and self.window is not None and query.size(0) > self.window:
            masked, causal = within_window(later_queries(0, query.size(0), query.device), self.window), False
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:  # each tensor-parallel rank drops in its own heads
            with get_cuda_rng_tracker().fork():
                return sdpa(query, key, value, masked, causal, self.softmax_scale, dropout)
        return sdpa(query, key, value, masked, causal, self.softmax_scale, dropout)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedSeqParams) -> Tensor:
        bounds = packing.cu_seqlens_q.tolist()
        parts = []
        for start, end in pairwise(bounds):
            if start == end:
                continue
            q, k, v = (x[start:end].unsqueeze(1) for x in (query, key, value))
            parts.append(self._attend(q, k, v, None, end - start > 1).squeeze(1))
        out = torch.cat(parts)
        return F.pad(out, (0, 0, 0, query.size(0) - out.size(0)))
