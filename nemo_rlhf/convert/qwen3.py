"""Qwen3: Llama whose query and key heads are normed before they are rotated, with a head size of its own."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.common import ATTENTION, MLP, QK_NORM, read_config, refuse, table, windows

NAME = "qwen3"
ARCHITECTURES = ("Qwen3ForCausalLM",)
TABLE = table(*ATTENTION, *QK_NORM, *MLP)
_DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096}


def architecture(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, NAME, "attention_bias")
    window = windows({**_DEFAULTS, **hf_config}, switch="use_sliding_window")
    return read_config(hf_config, NAME, defaults=_DEFAULTS, qk_norm=True, **window)
