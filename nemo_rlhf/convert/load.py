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
from nemo_rlhf.convert.source import RandomSource, WeightSource, normal, open_hf
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.experts import global_expert
from nemo_rlhf.parallel.gpt import GPT

__all__ = [
    "HEADS",
    "RandomSource",
    "check_source",
    "init_heads",
    "load_weights",
    "open_source",
    "read_architecture",
    "resolve_restore_from",
]

HEADS = ("value_head.", "ilql_heads.", "value_trunk.")  # what a language model does not have
# Transformer Engine's fused layers hold the norm that stands before them
_UNFUSED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}


def open_source(path: str | Path) -> WeightSource:
    """The language model at ``path``, Hugging Face directory or Megatron checkpoint. Raises ValueError as they do."""
    form, directory = resolve_restore_from(path)
    return open_hf(directory) if form == "hf" else CheckpointSource(directory, Architecture.load(directory))


def check_source(source: WeightSource, architecture: Architecture, *, critic: bool) -> None:
    """Account for every tensor of ``source`` before a model is made of what its description says.

    A ``critic`` does without the output layer. Raises ValueError as ``load_weights``.
    """
    weights = weight_map(architecture)
    has_own_output = OUTPUT_LAYER in weights.entries and not architecture.tie_embeddings
    optional = weights.entries[OUTPUT_LAYER].names if critic and has_own_output else ()
    weights.check({name: source.shape(name) for name in source.names()}, source.where, optional)


def load_weights(model: GPT, source: WeightSource, architecture: Architecture) -> None:
    """Fill this rank's parameters of ``model`` from ``source``, a model of ``architecture``.

    A critic takes the value head of a source that has one. From a language model it takes all but the output layer,
    which may be missing. Heads that the source does not have are left to ``init_heads``. Rows of the vocabulary's
    padding are zero.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape than ``architecture`` says; it is named. The same
            on every rank, before anything is read.
    """
    assert model.config.num_layers == architecture.num_layers, "the model was built for another architecture"
    weights = weight_map(architecture)
    assert model.role == "critic" or "value" not in architecture.heads, "a critic has no output layer"
    check_source(source, architecture, critic=model.role == "critic")
    cut = Cut(state.tp_rank(), state.tp_size(), model.padded_vocab_size)
    for name, parameter in _parameters(model):
        if name in weights.entries:
            _fill(parameter, weights.entries[name], source, cut)
        else:
            assert name.startswith(HEADS), f"the table of {architecture.family} has no row for {name}"


def _parameters(model: GPT) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters, under the names of the whole model: layers are numbered from the first stage on, experts
    from the first rank on that holds some."""
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, index, inner = name.split(".", 3)
            layer = model.decoder.layers[int(index)].layer_number - 1
            name = global_expert(f"decoder.layers.{layer}.{_UNFUSED.get(inner, inner)}", model)
        yield name, parameter


@torch.no_grad()
def _fill(parameter: torch.nn.Parameter, entry: Entry, source: WeightSource, cut: Cut) -> None:
    assert tuple(parameter.shape) == entry.local_shape(cut), f"{entry.megatron}: {tuple(parameter.shape)}"
    filled = 0
    for piece in entry.pieces(cut):
        place = parameter[piece.inside]
        values = source.read(entry.names[piece.tensor], piece.outside)
        place.copy_(values.T if entry.row.layout.transposed else values)
        filled += place.numel()
    if filled < parameter.numel():  # only the vocabulary is padded, and only at its end
        rows = filled // (parameter.numel() // parameter.shape[0])
        parameter[rows:].zero_()


@torch.no_grad()
def init_heads(model: GPT, seed: int) -> None:
    """Start heads afresh; on stages without any, nothing. A value head starts at zero, so that values are 0 until
    something is learned of the rewards' scale: a random head on normed hidden states says values around 1, which drown
    small rewards in the advantages."""
    for name, parameter in model.named_parameters():
        if name.startswith("value_head."):
            parameter.zero_()
    if model.ilql_heads is not None:
        model.ilql_heads.initialise(lambda name, shape: normal(name, seed, shape), model.architecture.vocab_size)
