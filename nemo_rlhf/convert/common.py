"""What the relatives of Llama share: the rows of their tables, and how their ``config.json`` is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.fields import flag, heads, integer, number, rope_parameters, shown, told
from nemo_rlhf.convert.mapping import EMBEDDING, OUTPUT_LAYER, GatedMLP, QueryKeyValue, Replicated, Row, Split, Stored
from nemo_rlhf.convert.mapping import Vocabulary as Vocab

MEGATRON = "decoder.layers.{layer}."
HF = "model.layers.{layer}."


def norm(megatron: str, stored: str, *, size: str = "hidden") -> Row:
    """A norm's weight, on every rank."""
    return Row(megatron, (Stored(stored, (size,)),), Replicated(), initial="ones")


ATTENTION = (
    norm(MEGATRON + "input_layernorm.weight", HF + "input_layernorm.weight"),
    Row(
        MEGATRON + "self_attention.linear_qkv.weight",
        (
            Stored(HF + "self_attn.q_proj.weight", ("query", "hidden")),
            Stored(HF + "self_attn.k_proj.weight", ("key_value", "hidden")),
            Stored(HF + "self_attn.v_proj.weight", ("key_value", "hidden")),
        ),
        QueryKeyValue(),
    ),
    Row(
        MEGATRON + "self_attention.linear_proj.weight",
        (Stored(HF + "self_attn.o_proj.weight", ("hidden", "query")),),
        Split(1),
        initial="residual",
    ),
    norm(MEGATRON + "pre_mlp_layernorm.weight", HF + "post_attention_layernorm.weight"),
)
QKV_BIAS = (
    Row(
        MEGATRON + "self_attention.linear_qkv.bias",
        (
            Stored(HF + "self_attn.q_proj.bias", ("query",)),
            Stored(HF + "self_attn.k_proj.bias", ("key_value",)),
            Stored(HF + "self_attn.v_proj.bias", ("key_value",)),
        ),
        QueryKeyValue(),
        initial="zeros",
    ),
)
QK_NORM = (
    norm(MEGATRON + "self_attention.q_layernorm.weight", HF + "self_attn.q_norm.weight", size="head"),
    norm(MEGATRON + "self_attention.k_layernorm.weight", HF + "self_attn.k_norm.weight", size="head"),
)
MLP = (
    Row(
        MEGATRON + "mlp.linear_fc1.weight",
        (
            Stored(HF + "mlp.gate_proj.weight", ("ffn", "hidden")),
            Stored(HF + "mlp.up_proj.weight", ("ffn", "hidden")),
        ),
        GatedMLP(),
        layers="dense",
    ),
    Row(
        MEGATRON + "mlp.linear_fc2.weight",
        (Stored(HF + "mlp.down_proj.weight", ("hidden", "ffn")),),
        Split(1),
        initial="residual",
        layers="dense",
    ),
)


def table(*layer: Row) -> tuple[Row, ...]:
    """The rows of a layer between embedding, final norm and output layer."""
    return (
        Row(EMBEDDING, (Stored("model.embed_tokens.weight", ("vocab", "hidden")),), Vocab()),
        *layer,
        norm("decoder.final_layernorm.weight", "model.norm.weight"),
        Row(OUTPUT_LAYER, (Stored("lm_head.weight", ("vocab", "hidden")),), Vocab()),
    )


# what transformers takes where a config.json says nothing; a family gives what is different in it
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


def read_config(
    hf_config: dict[str, Any],
    family: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    activations: tuple[str, ...] = ("silu",),
    **differences: Any,
) -> Architecture:
    """Read the ``config.json`` of a relative of Llama.

    Args:
        defaults: what the family takes for missing fields, where that is not as in Llama.
        activations: what its ``hidden_act`` may be.
        differences: fields of ``Architecture`` that are not as in Llama.

    Raises:
        ValueError: a field is missing, or asks for what the family's table does not cover.
    """
    settings = {**_DEFAULTS, **(defaults or {}), **hf_config}
    if settings["hidden_act"] not in activations:
        names = " or ".join(map(repr, activations))
        raise ValueError(
            f"config.json sets hidden_act={shown(settings['hidden_act'])}; in {family} models it is {names}."
        )
    try:
        return Architecture(
            family=family,
            num_layers=integer(settings, "num_hidden_layers"),
            hidden_size=integer(settings, "hidden_size"),
            ffn_hidden_size=integer(settings, "intermediate_size"),
            vocab_size=integer(settings, "vocab_size"),
            max_position_embeddings=integer(settings, "max_position_embeddings"),
            layernorm_epsilon=number(settings, "rms_norm_eps"),
            rope=rope_parameters(hf_config, (defaults or {}).get("rope_theta", 10000.0)),
            tie_embeddings=flag(settings, "tie_word_embeddings"),
            initializer_range=number(settings, "initializer_range"),
            dtype=stored_dtype(settings),
            hf_config=hf_config,
            **heads(settings),
            **differences,
        )
    except KeyError as error:
        raise ValueError(f"config.json lacks {error.args[0]!r}, which every {family} model has.") from None


def refuse(hf_config: dict[str, Any], family: str, *switches: str) -> None:
    """Raises ValueError when one of these fields is set to anything but false."""
    for key in switches:
        if hf_config.get(key):
            raise ValueError(
                f"config.json sets {key}={shown(hf_config[key])}, which is not supported for {family} models."
            )


def stored_dtype(hf_config: Mapping[str, Any]) -> str:
    return str(told(hf_config, "dtype", "torch_dtype") or "float32")


def windows(hf_config: dict[str, Any], *, switch: str | None = None) -> dict[str, Any]:
    """``sliding_window`` and ``windowed_layers`` of an ``Architecture``, from the fields of Mistral and Qwen.

    Args:
        switch: the field without which there is no window. With it, windows start at layer ``max_window_layers`` or are
            where ``layer_types`` says; without, they are in all layers.

    Raises:
        ValueError: the fields contradict each other.
    """
    layers = integer(hf_config, "num_hidden_layers") if "num_hidden_layers" in hf_config else 0
    is_on = hf_config.get("sliding_window") is not None and (switch is None or flag(hf_config, switch))
    window = integer(hf_config, "sliding_window", 0) if is_on else 0
    if switch is None:
        types = ["sliding_attention" if window else "full_attention"] * layers
    else:
        first = integer({"max_window_layers": 28, **hf_config}, "max_window_layers", 0)
        types = ["sliding_attention" if window and layer >= first else "full_attention" for layer in range(layers)]
    said = hf_config.get("layer_types") or types
    if not isinstance(said, list) or not all(isinstance(kind, str) for kind in said):
        raise ValueError(
            f"config.json sets layer_types={shown(said)}, which must be a list of names: restore the file."
        )
    windowed = tuple(layer for layer, kind in enumerate(said) if kind == "sliding_attention")
    known = {"full_attention", "sliding_attention"}
    if len(said) != layers or not set(said) <= known or (windowed and not window) or (switch is None and said != types):
        raise ValueError(
            f"config.json has layer_types={shown(said)} beside sliding_window={hf_config.get('sliding_window')} and "
            f"num_hidden_layers={layers}, which do not belong together: restore the file."
        )
    return {"sliding_window": window if windowed else None, "windowed_layers": windowed}
