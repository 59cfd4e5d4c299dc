"""Bytes of what depends on tokens: activations kept for the backward pass, key-value caches, logits.

Counted tensor by tensor from the code that makes them (``parallel.layers``, ``parallel.attention``,
``parallel.elementwise``, ``parallel.logprobs``, ``generation``, and Transformer Engine's modules), as autograd keeps
them with CUDA's fused attention and norms. Tests compare with the tensors that are really kept. Left out is what
differs on a CPU: the last layer need not answer for prompts, short sequences keep the weights of their attention, and
the last place of a row is not run.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.buckets import bucket_length, bucket_rows
from nemo_rlhf.launch.parameters import FP32, Cut, Role, num_trunks, padded_vocabulary, stage_layers

INT64 = 8
CACHE_MULTIPLE = 64  # tokens to which generation rounds its cache
PREFILL_TOKENS = 16384  # of one prefill at most
CHUNK_ELEMENTS = 2**26  # logits that exist at a time on a GPU, each in fp32


Backward = Literal["separate", "fused"]  # how gradients of weights are made: for themselves, or added up at once


@dataclass(frozen=True)
class Passage:
    """What goes through a model at a time: ``rows`` texts of ``length`` tokens, ``selected`` of which (over all rows)
    the loss is about. ``recompute`` (null | "selective" | "full") and ``layer_spec`` (not "auto"): as in the
    configuration."""

    rows: int
    length: int
    selected: int
    recompute: str | None = None
    layer_spec: str = "local"

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def engine(self) -> bool:
        """Whether layers are Transformer Engine's."""
        return self.layer_spec == "transformer_engine"


def layer_bytes(architecture: Architecture, layer: int, cut: Cut, passage: Passage, itemsize: int) -> int:
    """Kept for the backward pass of one layer."""
    tokens, channels = passage.tokens, architecture.kv_channels
    shard = tokens // cut.tp if cut.sequence_parallel else tokens  # of norms and residuals
    heads = architecture.num_attention_heads // cut.tp
    queries, keys = heads * channels, architecture.num_query_groups // cut.tp * channels
    moments = FP32 * (1 if architecture.normalization == "rmsnorm" else 2)  # of a norm's input

    normed = _normed_itemsize(architecture, passage, itemsize)
    norms = 2 * shard * (architecture.hidden_size * (normed + itemsize) + moments)
    if passage.recompute == "selective" and passage.engine and not architecture.is_sparse(layer):
        norms -= shard * (architecture.hidden_size * itemsize + moments)  # one is a part of the feed-forward part
    attention = tokens * (queries + 2 * keys) * itemsize  # before rotation, of which values are a view
    attention += tokens * queries * itemsize  # the output
    if architecture.position_embedding == "rope":
        attention += tokens * (queries + keys) * itemsize
        attention += 0 if passage.engine else passage.length * channels * itemsize  # cosines and sines
    if architecture.qk_norm:
        attention += tokens * (queries * itemsize + (heads + keys // channels) * moments)
    attention += tokens * heads * FP32  # log-sum-exp of the scores
    return norms + attention + _feed_forward_bytes(architecture, layer, cut, passage, itemsize)


def _normed_itemsize(architecture: Architecture, passage: Passage, itemsize: int) -> int:
    """Bytes of a number of a norm's input: zero-centred ones make an fp32 copy, where they are not one kernel."""
    return FP32 if architecture.zero_centered_norm and not passage.engine else itemsize


def _feed_forward_bytes(architecture: Architecture, layer: int, cut: Cut, passage: Passage, itemsize: int) -> int:
    inputs = 2 if architecture.gated else 1
    selective = passage.recompute == "selective"
    if not architecture.is_sparse(layer):
        return 0 if selective else passage.tokens * (inputs + 1) * architecture.ffn_hidden_size // cut.tp * itemsize
    if selective and not passage.engine:
        return 0
    shard = passage.tokens // cut.tp if cut.sequence_parallel else passage.tokens
    visits = shard * architecture.experts_per_token  # where every expert gets as many tokens
    width = architecture.expert_ffn_hidden_size
    # the tokens in the order of experts, fc1's output, the activation's before and after its weight, and that weight
    activations = 0 if selective else 2
    visited = visits * ((architecture.hidden_size + (inputs + activations) * width) * itemsize + FP32)
    # which expert, with which weight, and where each token went
    return visited + visits * (2 * INT64 + FP32) + shard * architecture.num_experts * (1 + FP32)


def stage_bytes(architecture: Architecture, cut: Cut, stage: int, passage: Passage, itemsize: int) -> int:
    """Kept by the layers of a pipeline stage for one microbatch, between its forward and its backward pass."""
    layers = stage_layers(architecture, cut.pp, stage)
    if passage.recompute == "full":
        shard = passage.tokens // cut.tp if cut.sequence_parallel else passage.tokens
        return len(layers) * shard * architecture.hidden_size * itemsize
    alike = Counter(architecture.is_sparse(layer) for layer in layers)
    examples = {architecture.is_sparse(layer): layer for layer in layers}
    return sum(
        count * layer_bytes(architecture, examples[sparse], cut, passage, itemsize) for sparse, count in alike.items()
    )


def ends_bytes(architecture: Architecture, role: Role, cut: Cut, stage: int, passage: Passage, itemsize: int) -> int:
    """Kept for one microbatch by what stands before the first layer and behind the last."""
    kept = passage.tokens * INT64 if stage == 0 else 0
    if stage < cut.pp - 1:
        return kept
    shard = passage.tokens // cut.tp if cut.sequence_parallel else passage.tokens
    moments = FP32 * (1 if architecture.normalization == "rmsnorm" else 2)
    normed = shard * (architecture.hidden_size * _normed_itemsize(architecture, passage, itemsize) + moments)
    kept += num_trunks(architecture, role) * normed
    rows = passage.selected
    if role == "critic":
        return kept + rows * (architecture.hidden_size * FP32 + INT64)
    # chosen hidden states; their places, tokens, whose they are, normalizer and entropy
    kept += rows * (architecture.hidden_size * itemsize + 2 * INT64 + 1 + 2 * FP32)
    if role == "ilql":
        hidden, width, num_q = architecture.hidden_size, architecture.ilql_head_width, architecture.ilql_num_q
        upcast = hidden * FP32 if itemsize != FP32 else 0
        kept += rows * (hidden * itemsize + INT64 + upcast + width * FP32)
        kept += rows * num_q * (width * itemsize + INT64 + 1 + 2 * FP32)
    return kept


def update_bytes(
    architecture: Architecture, role: Role, cut: Cut, stage: int, passage: Passage, microbatches: int, itemsize: int
) -> int:
    """Activations at the peak of an update: as many microbatches as the 1F1B schedule has under way on this stage, and
    what is being recomputed of one layer."""
    under_way = min(cut.pp - stage, microbatches)
    trunks = num_trunks(architecture, role)
    layers = trunks * stage_bytes(architecture, cut, stage, passage, itemsize)
    ends = ends_bytes(architecture, role, cut, stage, passage, itemsize)
    shard = passage.tokens // cut.tp if cut.sequence_parallel else passage.tokens
    hidden = shard * architecture.hidden_size * itemsize
    if stage < cut.pp - 1:  # what goes to the next stage is kept until its gradient comes
        layers += trunks * hidden
    if passage.recompute is None:
        return under_way * (layers + ends)
    whole = replace(passage, recompute=None)
    # of a layer that is recomputed as a whole, the input was kept anyway
    recomputed = max(
        layer_bytes(architecture, layer, cut, whole, itemsize)
        - (hidden if passage.recompute == "full" else layer_bytes(architecture, layer, cut, passage, itemsize))
        for layer in stage_layers(architecture, cut.pp, stage)
    )
    # the head is done with when the last layer is recomputed
    return (under_way - 1) * (layers + ends) + layers + max(ends, recomputed)


def update_peak(
    architecture: Architecture, role: Role, cut: Cut, stage: int, passage: Passage, microbatches: int, itemsize: int
) -> tuple[int, int, int]:
    """(activations, logits, other temporaries) at the moment of an update when they are the most: while a layer is gone
    through backwards, or before, while the head is."""
    args = architecture, role, cut, stage, passage, microbatches, itemsize
    backward: Backward = "fused" if passage.engine else "separate"
    in_layer = update_bytes(*args), 0, layer_temporaries(architecture, cut, passage.tokens, itemsize, backward)
    if stage < cut.pp - 1:
        return in_layer
    kept = num_trunks(architecture, role) * stage_bytes(architecture, cut, stage, passage, itemsize)
    kept += ends_bytes(architecture, role, cut, stage, passage, itemsize)
    in_head = kept, logits_bytes(architecture, role, cut, passage, itemsize), 0
    return max(in_layer, in_head, key=sum)


def layer_temporaries(
    architecture: Architecture, cut: Cut, tokens: int, itemsize: int, backward: Backward | None
) -> int:
    """Gone as soon as a layer is done, at their most in the feed-forward part: its inner tensors and three as wide as
    the model (its input, the residual and the one before), or their gradients. Backward, with few tokens, the gradient
    of a weight is more, unless it is made where gradients add up ("fused"): by then, what was kept of the inner tensors
    is gone."""
    width = architecture.ffn_hidden_size // cut.tp
    share = tokens
    if architecture.num_experts and not architecture.dense_layers:
        width = architecture.expert_ffn_hidden_size
        share = tokens * architecture.experts_per_token // (cut.tp if cut.sequence_parallel else 1)
    inputs = 2 if architecture.gated else 1
    inner = (inputs + 1) * width * share
    if backward == "separate":
        weight = width * architecture.hidden_size
        inner = max(inner, inputs * weight - width * share, weight + width * share)
    return (3 * architecture.hidden_size * tokens + inner) * itemsize


def logits_bytes(architecture: Architecture, role: Role, cut: Cut, passage: Passage, itemsize: int) -> int:
    """Temporaries of the vocabulary's part of a backward pass (``parallel.logprobs``): a chunk of log-probabilities,
    probabilities and gradients in fp32, the last in 16 bits too, and the gradient of the output layer, or of a Q head
    where those are wider."""
    if role == "critic":
        return 0
    columns = padded_vocabulary(architecture, cut.tp) // cut.tp
    chunk = min(passage.selected, max(1, CHUNK_ELEMENTS // columns))
    width = architecture.hidden_size
    if role == "ilql":
        width = max(width, architecture.ilql_head_width)
    rounded = itemsize if itemsize < FP32 else 0
    return chunk * columns * (3 * FP32 + rounded) + columns * width * (FP32 + itemsize)


def evaluation_bytes(
    architecture: Architecture, role: Role, cut: Cut, stage: int, passage: Passage, itemsize: int
) -> int:
    """The peak of a forward pass without a backward one, in a layer or in the head."""
    in_layer = layer_temporaries(architecture, cut, passage.tokens, itemsize, None)
    if stage < cut.pp - 1 or role == "critic":
        return in_layer
    columns = padded_vocabulary(architecture, cut.tp) // cut.tp
    chunk = min(passage.selected, max(1, CHUNK_ELEMENTS // columns))
    hidden = (passage.tokens + passage.selected) * architecture.hidden_size * itemsize
    return max(in_layer, hidden + 2 * FP32 * chunk * columns)


def _cache_length(longest: int) -> int:
    return math.ceil(longest / CACHE_MULTIPLE) * CACHE_MULTIPLE


def cache_bytes(architecture: Architecture, role: Role, cut: Cut, slots: int, longest: int, itemsize: int) -> int:
    """Keys and values of all slots on a pipeline stage, each as long as the longest sequence may become."""
    length = _cache_length(longest)
    groups = architecture.num_query_groups // cut.tp
    layers = num_trunks(architecture, role) * architecture.num_layers // cut.pp
    return 2 * layers * slots * groups * length * architecture.kv_channels * itemsize


def prefill_tokens(cut: Cut, slots: int, prompt: int, longest: int) -> int:
    """Tokens of the largest prefill: prompts of a group's slots, as many as may go together, padded as on GPUs."""
    length = min(bucket_length(prompt), _cache_length(longest))
    rows = bucket_rows(math.ceil(slots / cut.pp))
    while rows > 1 and rows * bucket_length(prompt) > PREFILL_TOKENS:
        rows //= 2
    return rows * length


def prefill_bytes(architecture: Architecture, cut: Cut, tokens: int, itemsize: int) -> int:
    """Temporaries of a prefill, which is not split along the sequence."""
    whole = Cut(cut.tp, cut.pp, cut.dp, cut.ep)
    return layer_temporaries(architecture, whole, tokens, itemsize, None)


def sampling_bytes(architecture: Architecture, role: Role, cut: Cut, slots: int, tokens: int, itemsize: int) -> int:
    """Logits behind a prefill of ``tokens``, its hidden states, and the noise with which a token is drawn; of an ILQL
    model, Q values."""
    columns = padded_vocabulary(architecture, cut.tp) // cut.tp
    rows = math.ceil(slots / cut.pp)
    guidance = (architecture.ilql_num_q + 2) * FP32 if role == "ilql" else 0
    hidden = num_trunks(architecture, role) * tokens * architecture.hidden_size * itemsize
    return hidden + rows * columns * (itemsize + 4 * FP32 + guidance)
