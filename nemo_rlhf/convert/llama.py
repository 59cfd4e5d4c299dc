"""Llama (2, 3, 3.1, 3.2): how its Hugging Face checkpoint maps onto megatron-core's GPT model."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.mapping import EMBEDDING, OUTPUT_LAYER, GatedMLP, QueryKeyValue, Replicated, Row, Split, Stored
from nemo_rlhf.convert.mapping import Vocabulary as Vocab

NAME = "llama"
ARCHITECTURES = ("LlamaForCausalLM",)

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

TABLE = (
    Row(EMBEDDING, (Stored("model.embed_tokens.weight", ("vocab", "hidden")),), Vocab()),
    Row(
        _MEGATRON + "input_layernorm.weight",
        (Stored(_HF + "input_layernorm.weight", ("hidden",)),),
        Replicated(),
        initial="ones",
    ),
    Row(
        _MEGATRON + "self_attention.linear_qkv.weight",
        (
            Stored(_HF + "self_attn.q_proj.weight", ("query", "hidden")),
            Stored(_HF + "self_attn.k_proj.weight", ("key_value", "hidden")),
            Stored(_HF + "self_attn.v_proj.weight", ("key_value", "hidden")),
        ),
        QueryKeyValue(),
    ),
    Row(
        _MEGATRON + "self_attention.linear_proj.weight",
        (Stored(_HF + "self_attn.o_proj.weight", ("hidden", "query")),),
        Split(1),
        initial="residual",
    ),
    Row(
        _MEGATRON + "pre_mlp_layernorm.weight",
        (Stored(_HF + "post_attention_layernorm.weight", ("hidden",)),),
        Replicated(),
        initial="ones",
    ),
    Row(
        _MEGATRON + "mlp.linear_fc1.weight",
        (
            Stored(_HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
            Stored(_HF + "mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        GatedMLP(),
    ),
    Row(
        _MEGATRON + "mlp.linear_fc2.weight",
        (Stored(_HF + "mlp.down_proj.weight", ("hidden", "ffn")),),
        Split(1),
        initial="residual",
    ),
    Row(
        "decoder.final_layernorm.weight",
        (Stored("model.norm.weight", ("hidden",)),),
        Replicated(),
        initial="ones",
    ),
    Row(OUTPUT_LAYER, (Stored("lm_head.weight", ("vocab", "hidden")),), Vocab()),
)

_ROPE_TYPES = ("default", "linear", "llama3")


def architecture(hf_config: dict[str, Any]) -> Architecture:
    """Read a Llama ``config.json``. Raises ValueError when it has a feature that Llama's table does not cover."""
    if hf_config.get("architectures") != list(ARCHITECTURES):
        raise ValueError(f"config.json names architectures={hf_config.get('architectures')}, not {ARCHITECTURES[0]}.")
    for key in ("attention_bias", "mlp_bias"):
        if hf_config.get(key):
            raise ValueError(f"config.json sets {key}=true, but only Llama models without biases are supported.")
    activation = hf_config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"config.json sets hidden_act={activation!r}, but only 'silu' is supported for Llama.")
    try:
        heads = int(hf_config["num_attention_heads"])
        return Architecture(
            family=NAME,
            num_layers=int(hf_config["num_hidden_layers"]),
            hidden_size=int(hf_config["hidden_size"]),
            ffn_hidden_size=int(hf_config["intermediate_size"]),
            num_attention_heads=heads,
            num_query_groups=int(hf_config.get("num_key_value_heads") or heads),
            kv_channels=int(hf_config.get("head_dim") or hf_config["hidden_size"] // heads),
            vocab_size=int(hf_config["vocab_size"]),
            max_position_embeddings=int(hf_config.get("max_position_embeddings", 2048)),
            layernorm_epsilon=float(hf_config.get("rms_norm_eps", 1e-6)),
            rope=rope_parameters(hf_config),
            tie_embeddings=bool(hf_config.get("tie_word_embeddings", False)),
            initializer_range=float(hf_config.get("initializer_range", 0.02)),
            dtype=str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"),
            hf_config=hf_config,
        )
    except KeyError as error:
        raise ValueError(f"config.json lacks {error.args[0]!r}, which every Llama model has.") from None


def rope_parameters(hf_config: dict[str, Any]) -> dict[str, Any]:
    """Rotary embedding as transformers 5 writes it (``rope_parameters``), also from the older fields ``rope_theta`` and
    ``rope_scaling``. Always has ``rope_type`` and ``rope_theta``; llama3 has all of its factors."""
    rope = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.pop("type", None)
    rope["rope_theta"] = float(rope.get("rope_theta") or hf_config.get("rope_theta") or 10000.0)
    if rope["rope_type"] not in _ROPE_TYPES:
        raise ValueError(f"config.json asks for rope_type={rope['rope_type']!r}, but only {_ROPE_TYPES} are supported.")
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for key in needed[rope["rope_type"]]:
        if key not in rope:
            raise ValueError(f"config.json asks for rope_type={rope['rope_type']!r} without its {key!r}.")
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", int(hf_config.get("max_position_embeddings", 2048)))
    return rope
