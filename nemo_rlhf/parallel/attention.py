"""Attention by ``scaled_dot_product_attention`` and its like, and megatron's self-attention over a key-value cache.

megatron-core's local core attention materialises the score matrix, and its self-attention rotates a whole cache anew.
Here the core runs torch's fused kernels (grouped-query heads, causal, masked, packed), and keys are rotated once.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from nemo_rlhf.parallel.kv_cache import KVCache
from nemo_rlhf.parallel.packing import PackedTexts
from nemo_rlhf.parallel.rotary import Rotation
from nemo_rlhf.parallel.short_attention import LONGEST, short_attention


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """How many tokens one sees in this layer (counted from 1), itself included; None for all before it."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    assert config.window_size is not None
    return config.window_size[0] + 1


class CachedSelfAttention(SelfAttention):
    """megatron's self-attention, which keeps rotated keys in a ``KVCache`` instead of rotating all of them anew.

    Rotates queries and keys itself, in fewer passes, and those of packed texts without asking the device where they
    begin.

    ``trims_queries``: with a mask (see ``later_queries``) it answers the queries of that mask only. That is for a
    model's last layer, where nobody reads the rest; the other layers take no notice of such a mask.
    """

    trims_queries = False
    _packing: PackedTexts | None = None
    _first_query = 0

    def __init__(
        self, config: TransformerConfig, submodules: Any, layer_number: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.window = window_of(config, layer_number)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._packing = kwargs.get("packed_seq_params")
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
            and isinstance(self.core_attention, SDPACoreAttention)
            and not (hidden_states.is_cuda or self._packing is not None or self.config.qk_layernorm)
            and hidden_states.dtype == torch.float32
        )

    def _forward_short(self, hidden_states: Tensor, angles: Tensor) -> tuple[Tensor, Tensor | None]:
        mixed, _ = self.linear_qkv(hidden_states)
        channels = self.hidden_size_per_attention_head
        mixed = mixed.view(*mixed.shape[:2], self.num_query_groups_per_partition, -1, channels)
        rotation = Rotation(angles, mixed.dtype, fused=False)
        cos, sin = rotation.cos.unsqueeze(3), rotation.sin.unsqueeze(3)
        answer: tuple[Tensor, Tensor | None] = self.linear_proj(
            short_attention(mixed, cos, sin, scale=1 / math.sqrt(channels), first=self._first_query)
        )
        return answer

    def _adjust_key_value_for_inference(
        self, inference_context: KVCache | None, query: Tensor, key: Tensor, value: Tensor, angles: Any, *_: Any
    ) -> Any:
        """megatron's hook between projection and attention: also where nothing is cached, queries and keys are rotated
        here."""
        if self._first_query:
            query = query[self._first_query :]
        if angles is not None:
            rotation = self._rotation(inference_context, angles[0], key)
            query, key = rotation.turn(query, self._first_query), rotation.turn(key)
        mask_type = self.attn_mask_type
        if inference_context is not None:
            key, value = inference_context.store(self, key, value)
            mask_type = AttnMaskType.no_mask if inference_context.is_decode_only() else AttnMaskType.causal
        return query, key, value, None, mask_type, None

    def _rotation(self, cache: KVCache | None, angles: Tensor, key: Tensor) -> Rotation:
        fused = self.config.apply_rope_fusion
        if cache is not None:
            return cache.rotation(angles, key.size(0), key.dtype, fused)
        if self._packing is not None:
            return self._packing.rotation(angles, key.dtype, fused)
        return Rotation(angles, key.dtype, fused)


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
        packed_seq_params: PackedTexts | None = None,
    ) -> Tensor:
        if packed_seq_params is not None:
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

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packing: PackedTexts) -> Tensor:
        """Of [T, heads, channels]; returns [T, heads * channels]."""
        kernel = _varlen_kernel() if query.is_cuda and query.dtype != torch.float32 else None
        if kernel is not None:
            bounds, longest = packing.cu_seqlens_q, packing.max_seqlen_q
            window = (-1 if self.window is None else self.window - 1, 0)
            out = kernel(query, key, value, bounds, bounds, longest, longest, self.softmax_scale, window)
            return out.reshape(query.size(0), -1)
        parts = zip(*(x.unsqueeze(1).split(packing.sizes) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(q, k, v, None, q.size(0) > 1).squeeze(1) for q, k, v in parts])


@functools.cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """Causal attention of packed texts in one kernel, if there is one: flash-attn's, or torch's own where that knows
    windows and grouped heads (2.11). Takes (query, key, value, bounds twice, longest twice, scale, window)."""
    with suppress(ImportError):
        from flash_attn import flash_attn_varlen_func

        def flash(*given: Any) -> Tensor:
            *tensors, scale, window = given
            return flash_attn_varlen_func(*tensors, softmax_scale=scale, causal=True, window_size=window)  # type: ignore[no-any-return]

        return flash
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn

        if {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():

            def varlen(*given: Any) -> Tensor:
                *tensors, scale, window = given
                grouped = tensors[0].size(1) != tensors[1].size(1)
                answer = varlen_attn(*tensors, scale=scale, window_size=window, enable_gqa=grouped)
                assert isinstance(answer, Tensor)
                return answer

            return varlen
    return None
