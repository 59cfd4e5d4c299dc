"""What families with experts share: their rows, and how the experts are read out of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rlhf.convert.common import HF, MEGATRON
from nemo_rlhf.convert.fields import integer, told
from nemo_rlhf.convert.mapping import GatedMLP, Replicated, Row, Stored

_EXPERT = MEGATRON + "mlp.experts.local_experts.{expert}."


def experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Router and experts of the layers that have them.

    Args:
        block: name of a layer's mixture in Hugging Face's checkpoint.
        gate, up, down: names of the three projections of an expert.
    """
    expert = f"{HF}{block}.experts.{{expert}}."
    return (
        Row(
            MEGATRON + "mlp.router.weight",
            (Stored(f"{HF}{block}.gate.weight", ("experts", "hidden")),),
            Replicated(),
            layers="sparse",
        ),
        Row(
            _EXPERT + "linear_fc1.weight",
            (
                Stored(f"{expert}{gate}.weight", ("expert_ffn", "hidden")),
                Stored(f"{expert}{up}.weight", ("expert_ffn", "hidden")),
            ),
            GatedMLP(),
            layers="sparse",
        ),
        Row(
            _EXPERT + "linear_fc2.weight",
            (Stored(f"{expert}{down}.weight", ("hidden", "expert_ffn")),),
            Replicated(),
            initial="residual",
            layers="sparse",
        ),
    )


def read_experts(settings: Mapping[str, Any], width: str, normalize: bool) -> dict[str, Any]:
    """The fields of an ``Architecture`` that tell of experts.

    Args:
        settings: ``config.json`` with the family's defaults.
        width: the field that holds the experts' width.
        normalize: whether the weights of a token's experts sum to one.

    Raises:
        ValueError: more experts are asked for than there are, or one whose weight is always one, which megatron-core
            cannot express.
    """
    number = integer({"num_experts": told(settings, "num_local_experts", "num_experts")}, "num_experts")
    chosen = integer(settings, "num_experts_per_tok")
    if chosen > number:
        raise ValueError(f"config.json sets num_experts_per_tok={chosen} of {number} experts: restore the file.")
    if chosen == 1 and normalize:
        raise ValueError(
            "config.json sends each token to one expert (num_experts_per_tok=1) and gives that a weight of 1, which "
            "megatron-core cannot express: the router would have nothing to learn from."
        )
    return {
        "num_experts": number,
        "experts_per_token": chosen,
        "expert_ffn_hidden_size": integer(settings, width),
        "normalize_expert_weights": normalize,
    }
