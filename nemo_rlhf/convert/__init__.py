"""Hugging Face <-> Megatron: one declarative table a family, read in both directions.

``families`` knows the tables, ``source`` where weights come from, ``load`` fills a model on every rank from its own
slices, ``transfer`` turns whole checkpoints into each other, ``comparison`` runs both and ``description`` says what one
holds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rlhf.convert.comparison import Agreement, verify
    from nemo_rlhf.convert.description import inspect
    from nemo_rlhf.convert.transfer import export_hf, import_hf

__all__ = ["Agreement", "export_hf", "import_hf", "inspect", "verify"]

_HOMES = {
    "Agreement": "comparison",
    "verify": "comparison",
    "inspect": "description",
    "export_hf": "transfer",
    "import_hf": "transfer",
}


def __getattr__(name: str) -> Any:
    # on demand: only the comparison needs megatron-core, whose import takes seconds
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
