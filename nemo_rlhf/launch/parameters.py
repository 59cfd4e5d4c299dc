"""What megatron-core allocates for the parameters of one rank, to the byte, without building anything.

The lists below follow ``parallel.gpt`` and ``parallel.optimizer``: the tensors of a pipeline stage in the order of
registration, since it decides how megatron's buffers are padded and cut. Tests compare with real allocations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nemo_rlhf.config.architecture import Architecture

Role = Literal["policy", "critic", "ilql", "trunk"]
WITHOUT_OUTPUT = ("critic", "trunk")
FP32 = 4
VOCABULARY_MULTIPLE = 8  # rows a tensor-parallel rank, as parallel.gpt pads
PARAMETER_MULTIPLE, BUCKET_MULTIPLE = 64, 128  # elements to which megatron's buffers align
BUCKET, BUCKET_PER_REPLICA = 40_000_000, 1_000_000  # least elements of a bucket, where there are several


@dataclass(frozen=True)
class Cut:
    """How a model is spread over ranks: ``dp`` replicas of ``tp * pp`` ranks each, and ``ep`` of a stage's ranks share
    its experts."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    sequence_parallel: bool = False

    @property
    def expert_replicas(self) -> int:
        """Ranks that hold the same experts, which tensor parallelism does not cut."""
        return self.tp * self.dp // self.ep


@dataclass(frozen=True)
class Parameter:
    """A tensor of one rank. ``shared``: both ends of the pipeline hold it, as embedding and as output layer."""

    numel: int
    itemsize: int
    expert: bool = False
    shared: bool = False
    trainable: bool = True

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class RoleBytes:
    """What one role takes on one rank: ``gradients`` are megatron's fp32 buffers, ``optimizer`` is this data-parallel
    rank's share of AdamW's moments and of the fp32 copies of 16-bit parameters."""

    weights: int
    gradients: int = 0
    optimizer: int = 0


def padded_vocabulary(architecture: Architecture, tp: int) -> int:
    """Rows of embedding and output layer over all ``tp`` ranks."""
    multiple = VOCABULARY_MULTIPLE * tp
    return math.ceil(architecture.vocab_size / multiple) * multiple


def stage_layers(architecture: Architecture, pp: int, stage: int) -> range:
    """Numbers of the layers of a pipeline stage, from 0."""
    share = architecture.num_layers // pp
    return range(stage * share, (stage + 1) * share)


def num_trunks(architecture: Architecture, role: Role) -> int:
    """Stacks of layers that a token goes through: an ILQL model's heads may stand on one of their own."""
    return 2 if role == "ilql" and architecture.ilql_value_trunk else 1


def stage_parameters(
    architecture: Architecture, role: Role, cut: Cut, stage: int, itemsize: int
) -> Iterator[Parameter]:
    """Every parameter of a rank of pipeline stage ``stage``, in the order of registration. ``itemsize``: bytes of a
    weight, 4 or 2; value heads, and ILQL's V and target Q heads, are fp32 in any case."""
    first, last = stage == 0, stage == cut.pp - 1
    tied = architecture.tie_embeddings and role not in WITHOUT_OUTPUT
    vocabulary = padded_vocabulary(architecture, cut.tp) // cut.tp * architecture.hidden_size
    shared = tied and cut.pp > 1
    if first:
        yield Parameter(vocabulary, itemsize, shared=shared)
        if architecture.position_embedding == "learned":
            yield Parameter(architecture.max_position_embeddings * architecture.hidden_size, itemsize)
    for layer in stage_layers(architecture, cut.pp, stage):
        for numel, expert in _layer(architecture, layer, cut):
            yield Parameter(numel, itemsize, expert=expert)
    if last:
        for numel in _norm(architecture, architecture.hidden_size):
            yield Parameter(numel, itemsize)
        if role not in WITHOUT_OUTPUT and not (tied and first):
            yield Parameter(vocabulary, itemsize, shared=shared)
    if num_trunks(architecture, role) == 2:
        yield from stage_parameters(architecture, "trunk", cut, stage, itemsize)
    if last and role == "critic":
        yield Parameter(architecture.hidden_size, FP32)
    if last and role == "ilql":
        yield from _ilql_heads(architecture, cut, itemsize)


def _norm(architecture: Architecture, width: int) -> tuple[int, ...]:
    return (width,) if architecture.normalization == "rmsnorm" else (width, width)


def _layer(architecture: Architecture, layer: int, cut: Cut) -> Iterator[tuple[int, bool]]:
    """(elements, whether they are an expert's) of a layer's tensors."""
    hidden, channels = architecture.hidden_size, architecture.kv_channels
    queries = architecture.num_attention_heads * channels // cut.tp
    qkv = queries + 2 * architecture.num_query_groups * channels // cut.tp
    dense = [*_norm(architecture, hidden), hidden * queries]
    dense += [hidden] if architecture.linear_bias else []
    dense += [hidden * qkv]
    dense += [qkv] if architecture.linear_bias or architecture.qkv_bias else []
    if architecture.qk_norm:
        dense += 2 * _norm(architecture, channels)
    dense += _norm(architecture, hidden)
    experts: list[int] = []
    if architecture.is_sparse(layer):
        dense += [architecture.num_experts * hidden]  # the router
        experts = _feed_forward(architecture, architecture.expert_ffn_hidden_size) * (
            architecture.num_experts // cut.ep
        )
    else:
        dense += _feed_forward(architecture, architecture.ffn_hidden_size // cut.tp)
    yield from ((numel, False) for numel in dense)
    yield from ((numel, True) for numel in experts)


def _feed_forward(architecture: Architecture, width: int) -> list[int]:
    hidden, inner = architecture.hidden_size, (2 if architecture.gated else 1) * width
    if architecture.linear_bias:
        return [hidden * inner, inner, width * hidden, hidden]
    return [hidden * inner, width * hidden]


def _ilql_heads(architecture: Architecture, cut: Cut, itemsize: int) -> Iterator[Parameter]:
    hidden, width = architecture.hidden_size, architecture.ilql_head_width
    trunk = (hidden * width, width)
    for numel in (*trunk, width, 1):
        yield Parameter(numel, FP32)
    rows = padded_vocabulary(architecture, cut.tp) // cut.tp * width
    for size, trainable in ((itemsize, True), (FP32, False)):
        for _ in range(architecture.ilql_num_q):
            for numel in (rows, *trunk):
                yield Parameter(numel, size, trainable=trainable)


def role_bytes(
    architecture: Architecture,
    role: Role,
    cut: Cut,
    stage: int,
    itemsize: int,
    *,
    trainable: bool,
    rank: int = 0,
    overlap: bool = True,
) -> RoleBytes:
    """What a role takes on a rank of a pipeline stage, between steps.

    Args:
        trainable: with gradients and an optimizer.
        rank: among the data-parallel ranks; shares differ by a few elements of padding.
        overlap: gradients are reduced while others are computed, as on GPUs, which takes several buckets.
    """
    parameters = list(stage_parameters(architecture, role, cut, stage, itemsize))
    if not trainable:
        return RoleBytes(sum(parameter.nbytes for parameter in parameters))
    weights = sum(parameter.nbytes for parameter in parameters if not parameter.trainable)
    gradients = optimizer = 0
    several = overlap and cut.dp > 1 and stage == 0
    for expert, replicas in ((False, cut.dp), (True, cut.expert_replicas)):
        bucket = max(BUCKET, BUCKET_PER_REPLICA * cut.dp) if several else None
        mine = rank if not expert else rank % replicas
        for size in (2, FP32):
            group = [p for p in parameters if p.trainable and p.expert == expert and p.itemsize == size]
            numel, owned = buffer_elements(group, replicas, mine, bucket)
            weights += numel * size
            gradients += numel * FP32
            optimizer += owned * (2 * FP32 + (FP32 if size == 2 else 0))
    return RoleBytes(weights, gradients, optimizer)


def buffer_elements(
    parameters: Sequence[Parameter], replicas: int, rank: int, bucket_size: int | None
) -> tuple[int, int]:
    """Elements of megatron's contiguous buffer of these parameters, and how many of their own elements lie in the share
    of data-parallel ``rank`` (megatron.core.distributed.param_and_grad_buffer of 0.16.1).

    From the last to the first, each starts at a multiple of 64. A bucket ends when it has ``bucket_size`` elements,
    before and after a shared parameter, and at a multiple of 128 and of the ranks, which have equal parts of it."""
    divisor = math.lcm(replicas, BUCKET_MULTIPLE)
    buckets: list[list[tuple[int, int]]] = [[]]  # (start, end) of each parameter
    begin = end = 0
    owned = 0

    def close() -> int:
        nonlocal owned
        limit = math.ceil(end / divisor) * divisor
        share = (limit - begin) // replicas
        low = begin + rank * share
        owned += sum(max(0, min(high, low + share) - max(start, low)) for start, high in buckets[-1])
        buckets.append([])
        return limit

    for parameter in reversed(parameters):
        start = math.ceil(end / PARAMETER_MULTIPLE) * PARAMETER_MULTIPLE
        if parameter.shared and buckets[-1]:
            begin = start = close()
        end = start + parameter.numel
        buckets[-1].append((start, end))
        if parameter.shared or (bucket_size is not None and end - begin >= bucket_size):
            begin = end = close()
    return (close() if buckets[-1] else end), owned


def num_parameters(architecture: Architecture) -> int:
    """Parameters of the language model, each counted once, without padding of the vocabulary."""
    total = sum(p.numel for p in stage_parameters(architecture, "policy", Cut(), 0, FP32))
    padding = padded_vocabulary(architecture, 1) - architecture.vocab_size
    return total - padding * architecture.hidden_size * (1 if architecture.tie_embeddings else 2)
