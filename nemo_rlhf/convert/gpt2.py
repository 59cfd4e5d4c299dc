"""GPT-2: learned positions, LayerNorm, biases everywhere, and weights stored as inputs by outputs (Conv1D)."""

from __future__ import annotations

from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.common import MEGATRON, refuse, stored_dtype
from nemo_rlhf.convert.fields import flag, head_width, integer, number, shown, told
from nemo_rlhf.convert.mapping import (
    EMBEDDING,
    OUTPUT_LAYER,
    FusedQueryKeyValue,
    Layout,
    Replicated,
    Row,
    Split,
    Stored,
    Transposed,
    Vocabulary,
)

NAME = "gpt2"
ARCHITECTURES = ("GPT2LMHeadModel",)
_HF = "transformer.h.{layer}."


def _norm(megatron: str, stored: str) -> tuple[Row, Row]:
    weight, bias = (
        (f"{megatron}.{kind}", (Stored(f"{stored}.{kind}", ("hidden",)),), Replicated()) for kind in ("weight", "bias")
    )
    return Row(*weight, initial="ones"), Row(*bias, initial="zeros")


def _column(megatron: str, stored: str, outputs: str, layout: Layout) -> tuple[Row, Row]:
    return (
        Row(f"{megatron}.weight", (Stored(f"{stored}.weight", ("hidden", outputs)),), Transposed(layout)),
        Row(f"{megatron}.bias", (Stored(f"{stored}.bias", (outputs,)),), layout, initial="zeros"),
    )


def _row(megatron: str, stored: str, inputs: str) -> tuple[Row, Row]:
    weight = Stored(f"{stored}.weight", (inputs, "hidden"))
    return (
        Row(f"{megatron}.weight", (weight,), Transposed(Split(1)), initial="residual"),
        Row(f"{megatron}.bias", (Stored(f"{stored}.bias", ("hidden",)),), Replicated(), initial="zeros"),
    )


TABLE = (
    Row(EMBEDDING, (Stored("transformer.wte.weight", ("vocab", "hidden")),), Vocabulary()),
    Row(
        "embedding.position_embeddings.weight",
        (Stored("transformer.wpe.weight", ("positions", "hidden")),),
        Replicated(),
    ),
    *_norm(MEGATRON + "input_layernorm", _HF + "ln_1"),
    *_column(MEGATRON + "self_attention.linear_qkv", _HF + "attn.c_attn", "query_key_value", FusedQueryKeyValue()),
    *_row(MEGATRON + "self_attention.linear_proj", _HF + "attn.c_proj", "query"),
    *_norm(MEGATRON + "pre_mlp_layernorm", _HF + "ln_2"),
    *_column(MEGATRON + "mlp.linear_fc1", _HF + "mlp.c_fc", "ffn", Split(0)),
    *_row(MEGATRON + "mlp.linear_fc2", _HF + "mlp.c_proj", "ffn"),
    *_norm("decoder.final_layernorm", "transformer.ln_f"),
    Row(OUTPUT_LAYER, (Stored("lm_head.weight", ("vocab", "hidden")),), Vocabulary()),
)


# transformers' general names for what GPT-2's config.json names otherwise
_ALIASES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
_DEFAULTS = {"n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.02}


def architecture(hf_config: dict[str, Any]) -> Architecture:
    refuse(hf_config, NAME, "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    if not hf_config.get("scale_attn_weights", True):
        raise ValueError(f"config.json sets scale_attn_weights=false, which is not supported for {NAME} models.")
    activation = hf_config.get("activation_function", "gelu_new")
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(
            f"config.json sets activation_function={shown(activation)}; in {NAME} models it is 'gelu_new'."
        )
    settings = {**_DEFAULTS, **hf_config}
    for name, alias in _ALIASES.items():
        if (value := told(hf_config, alias, name)) is not None:
            settings[name] = value
    try:
        hidden, heads = integer(settings, "n_embd"), integer(settings, "n_head")
        return Architecture(
            family=NAME,
            num_layers=integer(settings, "n_layer"),
            hidden_size=hidden,
            ffn_hidden_size=integer(settings, "n_inner") if settings.get("n_inner") is not None else 4 * hidden,
            num_attention_heads=heads,
            num_query_groups=heads,
            kv_channels=head_width(settings, "n_embd", heads),
            vocab_size=integer(settings, "vocab_size"),
            max_position_embeddings=integer(settings, "n_positions"),
            layernorm_epsilon=number(settings, "layer_norm_epsilon"),
            rope={},
            tie_embeddings=flag(settings, "tie_word_embeddings"),
            initializer_range=number(settings, "initializer_range"),
            dtype=stored_dtype(hf_config),
            hf_config=hf_config,
            normalization="layernorm",
            activation="gelu_tanh",
            gated=False,
            linear_bias=True,
            position_embedding="learned",
        )
    except KeyError as error:
        raise ValueError(f"config.json lacks {error.args[0]!r}, which every {NAME} model has.") from None
