"""What megatron-core is told of a model: its configuration, and rotary frequencies that it does not know itself."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_rlhf import device
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.experts import expert_settings
from nemo_rlhf.parallel.libraries import LayerSpec

Recompute = Literal["selective", "full"]


def _check_sizes(architecture: Architecture, tensor_parallel: int, pipeline_parallel: int) -> None:
    dense = any(not architecture.is_sparse(layer) for layer in range(architecture.num_layers))
    for name in ("num_attention_heads", "num_query_groups", *(["ffn_hidden_size"] if dense else [])):
        value = getattr(architecture, name)
        if value % tensor_parallel:
            raise ValueError(
                f"model.tensor_model_parallel_size={tensor_parallel} does not divide the model's {name}={value}: "
                f"choose a divisor of it."
            )
    if architecture.num_layers % pipeline_parallel:
        raise ValueError(
            f"model.pipeline_model_parallel_size={pipeline_parallel} does not divide the model's "
            f"num_layers={architecture.num_layers}: choose a divisor of it."
        )


def _computation(architecture: Architecture) -> dict[str, Any]:
    """What its layers compute, in the names of megatron's configuration."""
    windowed = [int(layer in architecture.windowed_layers) for layer in range(architecture.num_layers)]
    window = architecture.sliding_window if any(windowed) else None
    return {
        "normalization": {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[architecture.normalization],
        "layernorm_epsilon": architecture.layernorm_epsilon,
        "layernorm_zero_centered_gamma": architecture.zero_centered_norm,
        "qk_layernorm": architecture.qk_norm,
        "gated_linear_unit": architecture.gated,
        # both layer specs have a module for it, which megatron enables by this name and only beside functions of its
        # own list; Transformer Engine's GELU is the tanh approximation
        "activation_func": {"silu": F.silu, "gelu_tanh": F.gelu}[architecture.activation],
        "use_te_activation_func": True,
        "add_bias_linear": architecture.linear_bias,
        "add_qkv_bias": architecture.qkv_bias,
        "window_size": None if window is None else (window - 1, 0),
        "window_attn_skip_freq": windowed,
    }


def _recomputation(architecture: Architecture, recompute: Recompute | None, grouped: bool) -> dict[str, Any]:
    """What to compute anew in the backward pass. ``selective``: the feed-forward part, which keeps the most; attention
    keeps no scores, so there is nothing to save in it."""
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute is None:
        return {}
    modules = ["mlp"]
    if architecture.num_experts:  # tokens do not travel to experts a second time, where megatron can do without
        modules.append("moe_act" if grouped else "moe")
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def transformer_config(
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute | None,
    layer_spec: LayerSpec,
) -> TransformerConfig:
    """megatron's configuration for this model on the current process groups. Dropout is off: RL needs ratios of 1.

    Raises:
        ValueError: heads, groups, feed-forward width or layers cannot be divided as asked.
    """
    tensor_parallel, pipeline_parallel = state.tp_size(), state.pp_size()
    _check_sizes(architecture, tensor_parallel, pipeline_parallel)
    engine = layer_spec == "transformer_engine"
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=pipeline_parallel,
        sequence_parallel=sequence_parallel and tensor_parallel > 1,
        variable_seq_lengths=pipeline_parallel > 1,  # microbatches are as long as their longest row
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # every weight comes from a checkpoint or from a seeded source
        moe_token_dispatcher_type="alltoall",  # the default refuses variable sequence lengths, even without experts
        use_cpu_initialization=not device.is_cuda(),
        gradient_accumulation_fusion=False,  # ModelOptimizer switches it on where it can be had
        # otherwise a microbatch's gradients replace those that are there, if it is taken for the first
        disable_parameter_transpose_cache=engine,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=engine and architecture.position_embedding == "rope",
        **_graphs(),
        **_computation(architecture),
        **expert_settings(architecture, grouped=engine),
        **_recomputation(architecture, recompute, grouped=engine),
    )


def _graphs() -> dict[str, Any]:
    """megatron-core 0.16 warns, in every command, that the default of this field of its own is deprecated; this is what
    it puts in its place."""
    return {"cuda_graph_scope": []} if getattr(TransformerConfig, "cuda_graph_scope", None) == "full" else {}


def rotary_frequencies(architecture: Architecture) -> Tensor:
    """Inverse frequencies [channels / 2], by transformers itself: megatron hard-codes llama3's original length."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=architecture.hidden_size,
            num_attention_heads=architecture.num_attention_heads,
            head_dim=architecture.kv_channels,
            max_position_embeddings=architecture.max_position_embeddings,
            rope_parameters=dict(architecture.rope),
        )
    )
    if rotary.attention_scaling != 1.0 or rotary.rope_type == "dynamic":
        raise ValueError(
            f"rope_type={rotary.rope_type!r} cannot be expressed in megatron-core: use default, linear or llama3."
        )
    return rotary.inv_freq.detach().clone().float()
