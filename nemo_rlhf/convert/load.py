"""Fill a model from a source of weights: every rank reads its own slices, and every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.checkpoint import CheckpointSource
from nemo_rlhf.convert.families import weight_map
from nemo_rlhf.convert.locate import read_architecture, resolve_restore_from
from nemo_rlhf.convert.mapping import OUTPUT_LAYER, Cut, Entry
from nemo_rlhf.convert.source import RandomSource, WeightSource, open_hf
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.gpt import GPT

__all__ = [
    "RandomSource",
    "init_value_head",
    "load_weights",
    "open_source",
    "read_architecture",
    "resolve_restore_from",
]

_VALUE_HEAD = "value_head."
# Transformer Engine's fused layers hold the norm that stands before them
_UNFUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def open_source(path: str | Path) -> WeightSource:
    """The language model at ``path``, Hugging Face directory or Megatron checkpoint. Raises ValueError as they do."""
    form, directory = resolve_restore_from(path)
    return open_hf(directory) if form == "hf" else CheckpointSource(directory, Architecture.load(directory))


def load_weights(model: GPT, source: WeightSource, architecture: Architecture) -> None:
    """Fill this rank's parameters of ``model`` from ``source``, a language model.

    A critic takes all but the output layer, which the source may or may not have; its value head is left to
    ``init_value_head``. Rows of the vocabulary's padding are zero.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape than ``architecture`` says; it is named. The same
            on every rank, before anything is read.
    """
    assert model.config.num_layers == architecture.num_layers, "the model was built for another architecture"
    weights = weight_map(architecture)
    critic = model.role == "critic"
    optional = () if not critic or architecture.tie_embeddings else weights.entries[OUTPUT_LAYER].names
    weights.check({name: source.shape(name) for name in source.names()}, source.where, optional)
    cut = Cut(state.tp_rank(), state.tp_size(), model.padded_vocab_size)
    for name, parameter in _parameters(model):
        if not (critic and name.startswith(_VALUE_HEAD)):
            assert name in weights.entries, f"the table of {architecture.family} has no row for {name}"
            _fill(parameter, weights.entries[name], source, cut)


def _parameters(model: GPT) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters, under the names of the whole model: layers are numbered from the first stage on."""
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, index, inner = name.split(".", 3)
            layer = model.decoder.layers[int(index)].layer_number - 1
            name = f"decoder.layers.{layer}.{_UNFUSED.get(inner, inner)}"
        yield name, parameter


@torch.no_grad()
def _fill(parameter: torch.nn.Parameter, entry: Entry, source: WeightSource, cut: Cut) -> None:
    assert tuple(parameter.shape) == entry.local_shape(cut), f"{entry.megatron}: {tuple(parameter.shape)}"
    filled = 0
    for piece in entry.pieces(cut):
        place = parameter[piece.inside]
        place.copy_(source.read(entry.names[piece.tensor], piece.outside))
        filled += place.numel()
    if filled < parameter.numel():  # only the vocabulary is padded, and only at its end
        rows = filled // (parameter.numel() // parameter.shape[0])
        parameter[rows:].zero_()


@torch.no_grad()
def init_value_head(model: GPT) -> None:
    """Start a critic's value head at zero, so that values are 0 until something is learned of the rewards' scale: a
    random head on normed hidden states says values around 1, which drown small rewards in the advantages. Does nothing
    on stages without a head."""
    for name, parameter in model.named_parameters():
        if name.startswith(_VALUE_HEAD):
            parameter.zero_()
