"""Gemma (the first): Llama with scaled embeddings, norms that multiply by 1 + weight, and GELU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.common import ATTENTION, MLP, read_config, refuse, table

NAME = "gemma"
ARCHITECTURES = ("GemmaForCausalLM",)
TABLE = tuple(replace(row, initial="zeros") if row.initial == "ones" else row for row in table(*ATTENTION, *MLP))
_DEFAULTS = {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
# the first releases say "gelu", which transformers takes for the approximation that they were trained with
_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu")


def architecture(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, NAME, "attention_bias", "use_bidirectional_attention")
    as_llama = read_config(hf_config, NAME, defaults=_DEFAULTS, activations=_ACTIVATIONS)
    scale = as_llama.hidden_size**0.5
    return replace(as_llama, activation="gelu_tanh", zero_centered_norm=True, embedding_scale=scale)
