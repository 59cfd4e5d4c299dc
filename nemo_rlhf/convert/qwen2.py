"""Qwen2 and Qwen2.5: Llama with biases of query, key and value; upper layers may have windows."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.common import ATTENTION, MLP, QKV_BIAS, read_config, table, windows

NAME = "qwen2"
ARCHITECTURES = ("Qwen2ForCausalLM",)
TABLE = table(*ATTENTION, *QKV_BIAS, *MLP)
_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}


def architecture(hf_config: dict[str, Any]) -> Architecture:
    window = windows({**_DEFAULTS, **hf_config}, switch="use_sliding_window")
    return read_config(hf_config, NAME, defaults=_DEFAULTS, qkv_bias=True, **window)
