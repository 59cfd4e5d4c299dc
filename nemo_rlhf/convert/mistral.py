"""Mistral: Llama, whose tokens may see only a window of those before them."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.common import ATTENTION, MLP, read_config, table, windows

NAME = "mistral"
ARCHITECTURES = ("MistralForCausalLM",)
TABLE = table(*ATTENTION, *MLP)
_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}


def architecture(hf_config: dict[str, Any]) -> Architecture:
    return read_config(hf_config, NAME, defaults=_DEFAULTS, **windows({**_DEFAULTS, **hf_config}))
