"""The families that can be converted, found by the name that Hugging Face gives their architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert import llama
from nemo_rlhf.convert.mapping import Row, WeightMap

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Family:
    name: str
    architectures: tuple[str, ...]
    architecture: Callable[[dict[str, Any]], Architecture]
    table: tuple[Row, ...]


# A family is a module with these four names; adding one is a file and its name here (docs/adding_a_model.md).
FAMILIES = tuple(Family(module.NAME, module.ARCHITECTURES, module.architecture, module.TABLE) for module in (llama,))


def architecture_of(hf_config: dict[str, Any]) -> Architecture:
    """Read a ``config.json``. Raises ValueError with one sentence for a model that is not supported."""
    names = hf_config.get("architectures") or []
    supported = [name for family in FAMILIES for name in family.architectures]
    found = [family for family in FAMILIES if len(names) == 1 and names[0] in family.architectures]
    if not found:
        raise ValueError(
            f"config.json names architectures={names}, which is not supported; supported: {', '.join(supported)}."
        )
    if hf_config.get("quantization_config"):
        raise ValueError("config.json has a quantization_config: only unquantised weights can be trained, use those.")
    architecture = found[0].architecture(hf_config)
    if architecture.dtype not in _DTYPES:
        raise ValueError(f"config.json names dtype={architecture.dtype!r}; supported: {', '.join(_DTYPES)}.")
    return architecture


def weight_map(architecture: Architecture) -> WeightMap:
    """The table of the architecture's family, with its names and shapes."""
    for family in FAMILIES:
        if family.name == architecture.family:
            return WeightMap(family.table, architecture)
    names = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"The model is of family {architecture.family!r}, which is not supported; supported: {names}.")
