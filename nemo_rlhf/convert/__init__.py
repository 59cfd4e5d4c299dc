"""Hugging Face <-> Megatron: one declarative table a family, read in both directions.

``families`` knows the tables, ``source`` where weights come from, ``load`` fills a model on every rank from its own
slices, ``transfer`` turns whole checkpoints into each other.
"""

from nemo_rlhf.convert.transfer import export_hf, import_hf

__all__ = ["export_hf", "import_hf"]
