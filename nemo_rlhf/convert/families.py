"""The families that can be converted, found by the name that Hugging Face gives their architecture."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nemo_rlhf.config.architecture import MAX_PARTS, Architecture
from nemo_rlhf.convert import gemma, gpt2, llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from nemo_rlhf.convert.fields import integer, shown
from nemo_rlhf.convert.mapping import EMBEDDING, Row, WeightMap

_COUNTS = (("num_hidden_layers", "n_layer"), ("num_local_experts", "num_experts"))
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Family:
    name: str
    architectures: tuple[str, ...]
    architecture: Callable[[dict[str, Any]], Architecture]
    table: tuple[Row, ...]

    @property
    def classifier(self) -> str:
        """The same model with a score in place of logits, as transformers names it: a reward model, or a critic."""
        return re.sub(r"(ForCausalLM|LMHeadModel)$", "ForSequenceClassification", self.architectures[0])

    @property
    def trunk(self) -> str:
        """The same without any head, as transformers names it."""
        return re.sub(r"(ForCausalLM|LMHeadModel)$", "Model", self.architectures[0])

    @property
    def embedding(self) -> str:
        """The embedding's Hugging Face name."""
        return next(row.stored[0].name for row in self.table if row.megatron == EMBEDDING)


# A family is a module with these four names; adding one is a file and its name here (docs/adding_a_model.md).
_MODULES = (llama, mistral, qwen2, qwen3, gemma, gpt2, mixtral, qwen3_moe)
FAMILIES = tuple(Family(module.NAME, module.ARCHITECTURES, module.architecture, module.TABLE) for module in _MODULES)
_REFUSED = {
    "Gemma2ForCausalLM": "Gemma 2 is not supported: megatron-core can express neither its soft-capped attention scores "
    "and logits nor its norms behind attention and feed-forward layers; use the first Gemma or another family."
}


def architecture_of(hf_config: dict[str, Any]) -> Architecture:
    """Read a ``config.json``. Raises ValueError with one sentence for a model that is not supported."""
    family, name = _named(hf_config)
    if hf_config.get("quantization_config"):
        raise ValueError("config.json has a quantization_config: only unquantised weights can be trained, use those.")
    _refuse_too_many(hf_config)
    architecture = family.architecture(hf_config)
    if name == family.classifier:
        num_labels = _num_labels(hf_config)
        if num_labels != 1:
            raise ValueError(
                f"config.json names {num_labels} labels; a reward model or critic has one: use such a model."
            )
        architecture = replace(architecture, heads=("value",))
    if architecture.dtype not in _DTYPES:
        raise ValueError(f"config.json names dtype={architecture.dtype!r}; supported: {', '.join(_DTYPES)}.")
    return architecture


def _named(hf_config: dict[str, Any]) -> tuple[Family, str]:
    """The family, and the name of its class. transformers goes by ``model_type``, which must be the same family's."""
    names = hf_config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"config.json sets architectures={shown(names)}, which must be a list of names: restore the file."
        )
    supported = [name for family in FAMILIES for name in family.architectures]
    found = [f for f in FAMILIES if len(names) == 1 and names[0] in (*f.architectures, f.classifier)]
    if len(names) == 1 and names[0] in _REFUSED:
        raise ValueError(_REFUSED[names[0]])
    if not found:
        raise ValueError(
            f"config.json names architectures={shown(names)}, which is not supported; supported: "
            f"{', '.join(supported)}, and each family's ...ForSequenceClassification with one label."
        )
    if hf_config.get("model_type") not in (None, found[0].name):
        raise ValueError(
            f"config.json says model_type={shown(hf_config['model_type'])} and architectures={shown(names)}, which are "
            "different families: correct the wrong one."
        )
    return found[0], names[0]


def _refuse_too_many(hf_config: dict[str, Any]) -> None:
    """Nothing is made of a number of layers or experts that no model has: a table of them may not fit in memory."""
    layers, experts = (max([1, *(n for n in map(hf_config.get, names) if isinstance(n, int))]) for names in _COUNTS)
    if layers * experts > MAX_PARTS:
        raise ValueError(f"config.json asks for {layers} layers and {experts} experts in each, which no model has.")


def _num_labels(hf_config: dict[str, Any]) -> int:
    labels, said = hf_config.get("id2label"), hf_config.get("num_labels")
    if labels is not None and not isinstance(labels, dict):
        raise ValueError(f"config.json sets id2label={shown(labels)}, which must be an object: restore the file.")
    if labels is not None and said is not None and said != len(labels):
        raise ValueError(
            f"config.json says num_labels={shown(said)} and has {len(labels)} labels in id2label: correct the wrong "
            "one."
        )
    if labels is not None:
        return len(labels)
    return integer(hf_config, "num_labels") if said is not None else 2  # as transformers


def _family(architecture: Architecture) -> Family:
    for family in FAMILIES:
        if family.name == architecture.family:
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"The model is of family {architecture.family!r}, which is not supported; supported: {names}.")


def weight_map(architecture: Architecture) -> WeightMap:
    """The table of the architecture's family, with its names and shapes."""
    return WeightMap(_family(architecture).table, architecture)


def class_name(architecture: Architecture) -> str:
    """transformers' class for this architecture, by its heads."""
    family = _family(architecture)
    if "trunk" in architecture.heads:
        return family.trunk
    return family.classifier if "value" in architecture.heads else family.architectures[0]
