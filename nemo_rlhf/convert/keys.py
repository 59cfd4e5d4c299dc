"""Under which key megatron-core's checkpoint holds a parameter, and where in the tensor of that key.

Layers that are all alike are stacked in one tensor, and so are the experts of a layer; where layers differ (some dense,
some of experts) each has keys of its own. Reading and writing both ask here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nemo_rlhf.config.architecture import Architecture

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_EXPERTS = "mlp.experts.experts."
# where Transformer Engine's fused layers keep the norms; megatron-core writes these names whatever built the model
_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


class Place(NamedTuple):
    """The parameter is ``stored[key][leading]``; ``sizes`` are those of the axes that ``leading`` goes into (layers,
    experts). Both are empty for a tensor that is not stacked."""

    key: str
    leading: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def written(architecture: Architecture, name: str) -> Place:
    """Where megatron-core writes the parameter ``name`` of the whole model (layers and experts numbered from its
    beginning, as the families' tables do)."""
    return candidates(architecture, name)[0]


def candidates(architecture: Architecture, name: str) -> tuple[Place, ...]:
    """Everywhere that a megatron-core program may have put the parameter; the first is where it does by default."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return (Place(name),)
    layer, parameter = int(match[1]), match[2]
    stacked = "decoder.layers.", (layer,), (architecture.num_layers,)
    single: tuple[str, tuple[int, ...], tuple[int, ...]] = f"decoder.layers.{layer}.", (), ()
    ways = (single, stacked) if architecture.dense_layers else (stacked, single)
    if expert := _EXPERT.fullmatch(parameter):
        number, inner = int(expert[1]), expert[2]
        together = [
            Place(prefix + _EXPERTS + inner, (*leading, number), (*sizes, architecture.num_experts))
            for prefix, leading, sizes in ways
        ]
        return (*together, Place(f"{single[0]}{_EXPERTS}{number}.{inner}"))
    return tuple(
        Place(prefix + alias, leading, sizes)
        for alias in _aliases(architecture, layer, parameter)
        for prefix, leading, sizes in ways
    )


def _aliases(architecture: Architecture, layer: int, parameter: str) -> tuple[str, ...]:
    """Names of a layer's parameter, likeliest first. Transformer Engine does not fuse the norm before experts."""
    for plain, fused in _FUSED.items():
        if parameter.startswith(plain):
            alias = fused + parameter.removeprefix(plain)
            sparse = architecture.is_sparse(layer) and plain == "pre_mlp_layernorm."
            return (parameter, alias) if sparse else (alias, parameter)
    return (parameter,)
