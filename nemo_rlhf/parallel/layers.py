"""Which modules a layer is made of: Transformer Engine's when importable, otherwise megatron's local ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_rlhf import device
from nemo_rlhf.parallel.attention import CachedSelfAttention, SDPACoreAttention, sdpa
from nemo_rlhf.parallel.elementwise import SwiGLU


def uses_transformer_engine() -> bool:
    return HAVE_TE and device.is_cuda()


class RMSNorm(torch.nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) that works on a sequence-parallel shard: its weight is marked, so that
    megatron sums its gradient over the tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


def _local_block(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.module = CachedSelfAttention
    parts.self_attention.submodules.core_attention = SDPACoreAttention
    parts.mlp.submodules.activation_func = SwiGLU
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _transformer_engine_block(config: TransformerConfig, num_layers: int) -> TransformerBlockSubmodules:
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

    class CoreAttention(TEDotProductAttention):
        """Transformer Engine's attention, except for a decoding step: its mask is one of slots with own lengths."""

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kw: Any
        ) -> Tensor:
            if kw.get("attn_mask_type") == AttnMaskType.no_mask and attention_mask is not None:
                return sdpa(query, key, value, attention_mask, False, 1 / query.size(-1) ** 0.5)
            return super().forward(query, key, value, attention_mask, *args, **kw)

    layer = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec())
    layer.submodules.self_attention.module = CachedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the norm that ends the last one."""
    num_layers = get_num_layers_to_build(config)
    if uses_transformer_engine():
        return _transformer_engine_block(config, num_layers)
    return _local_block(config, num_layers)
