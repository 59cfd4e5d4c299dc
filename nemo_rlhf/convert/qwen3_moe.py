"""Qwen3-MoE: Qwen3 with a mixture of experts in all layers or some."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.common import ATTENTION, MLP, QK_NORM, read_config, refuse, table, windows
from nemo_rlhf.convert.experts import experts, read_experts
from nemo_rlhf.convert.fields import flag, integer, shown

NAME = "qwen3_moe"
ARCHITECTURES = ("Qwen3MoeForCausalLM",)
TABLE = table(*ATTENTION, *QK_NORM, *MLP, *experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"))
_DEFAULTS = {
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
}


def architecture(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, NAME, "attention_bias")
    settings = {**_DEFAULTS, **hf_config}
    settings.setdefault("num_experts", hf_config.get("num_local_experts", 128))
    if not flag(settings, "use_sliding_window"):
        settings["sliding_window"] = None
    dense = settings.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ValueError(f"config.json sets mlp_only_layers={shown(dense)}, which must be a list: restore the file.")
    step, layers = integer(settings, "decoder_sparse_step"), range(integer(settings, "num_hidden_layers"))
    mixture = read_experts(settings, "moe_intermediate_size", flag(settings, "norm_topk_prob"))
    mixture["dense_layers"] = tuple(layer for layer in layers if layer in dense or (layer + 1) % step)
    if len(mixture["dense_layers"]) == len(layers):
        raise ValueError(
            "config.json leaves no layer with experts (mlp_only_layers, decoder_sparse_step): it is Qwen3."
        )
    return read_config(hf_config, NAME, defaults=_DEFAULTS, qk_norm=True, **windows(settings), **mixture)
