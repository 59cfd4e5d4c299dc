"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.common import ATTENTION, read_config, table, windows
from nemo_rlhf.convert.experts import experts, read_experts

NAME = "mixtral"
ARCHITECTURES = ("MixtralForCausalLM",)
TABLE = table(*ATTENTION, *experts("block_sparse_moe", gate="w1", up="w3", down="w2"))
_DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
}


def architecture(hf_config: dict[str, Any]) -> Architecture:
    settings = {**_DEFAULTS, **hf_config}
    settings.setdefault("num_local_experts", hf_config.get("num_experts", 8))
    mixture = read_experts(settings, "intermediate_size", normalize=True)
    return read_config(hf_config, NAME, defaults=_DEFAULTS, **windows(settings), **mixture)
