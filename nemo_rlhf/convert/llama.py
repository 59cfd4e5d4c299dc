"""Llama (2, 3, 3.1, 3.2): how its Hugging Face checkpoint maps onto megatron-core's GPT model."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.common import ATTENTION, MLP, read_config, refuse, table

NAME = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)
TABLE = table(*ATTENTION, *MLP)


def architecture(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, NAME, "attention_bias", "mlp_bias")
    return read_config(hf_config, NAME)
