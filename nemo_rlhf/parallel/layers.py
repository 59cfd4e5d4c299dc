"""Which modules a layer is made of: Transformer Engine's, or megatron's local ones with torch's kernels."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.parallel.attention import CachedSelfAttention, SDPACoreAttention, add_to_last_rows, sdpa
from nemo_rlhf.parallel.elementwise import GELU, GeGLU, SwiGLU, rms_norm
from nemo_rlhf.parallel.experts import layer_specs, submodules_of
from nemo_rlhf.parallel.libraries import LayerSpec


class RMSNorm(torch.nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) that works on a sequence-parallel shard: its weight is marked, so that
    megatron sums its gradient over the tensor-parallel ranks. Zero-centred, the weight is the scale less one, and the
    product is taken in fp32 before rounding, as transformers does it for Gemma."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if self.zero_centered:
            return rms_norm(x.float(), 1.0 + self.weight.float(), self.eps).to(x.dtype)
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """LayerNorm (Ba et al. 2016) that works on a sequence-parallel shard, as ``RMSNorm`` does."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps, self.shape = eps, (hidden_size,)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


_NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
_ACTIVATIONS = {("silu", True): SwiGLU, ("gelu_tanh", True): GeGLU, ("gelu_tanh", False): GELU}


def _local_block(config: TransformerConfig, architecture: Architecture) -> TransformerBlockSubmodules:
    norm = _NORMS[architecture.normalization]
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    parts.self_attention.module = CachedSelfAttention
    parts.self_attention.submodules.core_attention = SDPACoreAttention
    parts.self_attn_bda = add_to_last_rows
    if architecture.qk_norm:
        parts.self_attention.submodules.q_layernorm = parts.self_attention.submodules.k_layernorm = norm
    submodules_of(parts.mlp).activation_func = _ACTIVATIONS[architecture.activation, architecture.gated]
    return TransformerBlockSubmodules(layer_specs=layer_specs(config, architecture, layer, norm), layer_norm=norm)


def _transformer_engine_block(config: TransformerConfig, architecture: Architecture) -> TransformerBlockSubmodules:
    from megatron.core.extensions.transformer_engine import TEActivationOp, TEDotProductAttention, TENorm

    class Activation(MegatronModule):
        """Transformer Engine's kernel of a (gated) activation. Its own module cannot be saved by megatron."""

        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)
            self._kernel = TEActivationOp(config).forward

        def forward(self, x: Tensor) -> Tensor:
            return self._kernel(x)  # type: ignore[no-any-return]

    class CoreAttention(TEDotProductAttention):
        """Transformer Engine's attention, except for a decoding step: its mask is one of slots with own lengths."""

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *args: Any, **kw: Any
        ) -> Tensor:
            if kw.get("attn_mask_type") == AttnMaskType.no_mask and attention_mask is not None:
                return sdpa(query, key, value, attention_mask, False, 1 / query.size(-1) ** 0.5)
            return super().forward(query, key, value, attention_mask, *args, **kw)

    layer = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm))
    layer.submodules.self_attention.module = CachedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    submodules_of(layer.submodules.mlp).activation_func = Activation
    return TransformerBlockSubmodules(layer_specs=layer_specs(config, architecture, layer, TENorm), layer_norm=TENorm)


def block_spec(
    config: TransformerConfig, architecture: Architecture, layer_spec: LayerSpec
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the norm that ends the last one."""
    if layer_spec == "transformer_engine":
        return _transformer_engine_block(config, architecture)
    return _local_block(config, architecture)
