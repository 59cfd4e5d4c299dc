"""What the ranks of tests/test_plan.py do: build real models, train one step, and count bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.generation import engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.base import MegatronModel
from nemo_rlhf.models.critic import CriticModel
from nemo_rlhf.models.ilql import ILQLModel
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.parallel import attention, kv_cache, logprobs, schedule, shapes, state
from nemo_rlhf.parallel.gpt import GPT, build_gpt
from nemo_rlhf.parallel.schedule import Microbatch
from nemo_rlhf.types import Prompt, Request

ROWS, LENGTH, RESPONSE = 3, 48, 20  # of a microbatch; the response's tokens are selected
MICROBATCHES = 3
SLOTS, NEW_TOKENS = 5, 4
KINDS: dict[str, type[MegatronModel]] = {"policy": PolicyModel, "critic": CriticModel, "ilql": ILQLModel}


@dataclass(frozen=True)
class Case:
    """A role on a cut of the world; ``generate``: run the engine, too."""

    name: str
    architecture: Architecture
    role: str = "policy"
    tp: int = 1
    pp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    precision: str = "32"
    recompute: str | None = None
    layer_spec: str = "local"
    generate: bool = False
    bucket_size: int | None = None


@dataclass
class Measured:
    """Bytes on one rank. ``activations``: the largest sum of what was kept at a time."""

    stage: int
    dp_rank: int
    frozen: int
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    cache: list[int] = field(default_factory=list)
    buckets: tuple[int, int] = 0, 0


def measure(cases: Sequence[Case]) -> dict[str, Measured]:
    return {case.name: _measure_buckets(case) if case.bucket_size else _measure(case) for case in cases}


def _measure_buckets(case: Case) -> Measured:
    """Elements of megatron's buffer and of this rank's parameters in it, cut into buckets as on GPUs."""
    state.initialize(case.tp, case.pp, seed=1)
    gpt = build_gpt(case.architecture)
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        grad_reduce_in_fp32=True,
        bucket_size=case.bucket_size,
    )
    (buffer,) = DistributedDataParallel(gpt.config, settings, gpt).buffers
    assert state.pp_rank() or len(buffer.buckets) > 3
    (ranges,) = DistributedOptimizer._build_gbuf_range_map(buffer).values()
    owned = sum(len(part["param"]) for bucket in ranges for part in bucket["param_map"].values())
    return Measured(state.pp_rank(), state.dp_rank(), 0, buckets=(buffer.numel, owned))


def _measure(case: Case) -> Measured:
    state.initialize(case.tp, case.pp, seed=1, expert_parallel=case.ep)
    config = ModelConfig(
        restore_from="",
        sequence_parallel=case.sequence_parallel,
        micro_batch_size=ROWS,
        activations_checkpoint_granularity=case.recompute,
        layer_spec=case.layer_spec,
    )
    model = KINDS[case.role](config, case.architecture, case.precision)
    frozen = _bytes(model.gpt.parameters())
    for parameter in model.gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.make_trainable(OptimConfig(), 2)
    found = Measured(state.pp_rank(), state.dp_rank(), frozen)
    with as_on_a_gpu(), kept_for_backward(model.gpt) as kept:
        model.learn(_batch(model), _loss)
    found.activations = kept.peak
    learner = model.learner
    assert learner is not None
    buffers = [*learner.ddp.buffers, *learner.ddp.expert_parallel_buffers]
    found.weights = _bytes(model.gpt.parameters())
    found.gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
    found.optimizer = _optimizer_bytes(model)
    if case.generate:
        found.cache = _cache_bytes(model.gpt)
    return found


def _bytes(tensors: Any) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer_bytes(model: MegatronModel) -> int:
    learner = model.learner
    assert learner is not None
    weights = {p.untyped_storage()._cdata for p in model.gpt.parameters()}
    held: list[Tensor] = [p for group in learner.optimizer.param_groups for p in group["params"]]
    for part in learner.optimizer.chained_optimizers:
        held += [value for entry in part.optimizer.state.values() for value in entry.values() if value.dim()]
    return _bytes(t for t in held if t.untyped_storage()._cdata not in weights)


def _batch(model: MegatronModel) -> list[Microbatch]:
    """The same number of microbatches, all of one shape, on every data-parallel rank."""
    rows = ROWS * MICROBATCHES * state.dp_size()
    length = LENGTH + (not model.gpt.config.sequence_parallel)  # otherwise the last place is not run
    tokens = torch.randint(0, model.architecture.vocab_size, (rows, length))
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[:, 1 : 1 + RESPONSE] = True  # the shortest prompt there is: no layer leaves out anything
    return model.cut(tokens, mask, torch.full((rows,), length), range(rows))


def _loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Everything that the role says of the selected tokens, summed."""
    places = hidden, batch.tokens, batch.selected
    if gpt.role == "critic":
        total = gpt.values(*places).sum()
    elif gpt.role == "ilql":
        scores = gpt.ilql_scores(*places, detach=False)
        total = torch.stack([*scores.q_taken, *scores.q_logsumexp, scores.values, scores.logprobs]).sum()
    else:
        total = gpt.vocab_logprobs(*places)[0].sum()
    return total / batch.selected.numel(), {"loss": total.detach()}


# ---- what autograd keeps


class Kept:
    """Storages that are alive for the backward pass, each counted once; parameters do not count."""

    def __init__(self, ignored: set[int]) -> None:
        self._ignored, self._alive, self._now = ignored, {}, 0
        self.peak = 0

    def add(self, tensor: Tensor) -> Callable[[], None]:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored:
            return lambda: None
        if not self._alive.get(key):
            self._now += size
            self.peak = max(self.peak, self._now)
        self._alive[key] = self._alive.get(key, 0) + 1

        def remove() -> None:
            self._alive[key] -= 1
            if not self._alive[key]:
                del self._alive[key]
                self._now -= size

        return remove


class _Saved:
    def __init__(self, tensor: Tensor, remove: Callable[[], None]) -> None:
        self.tensor, self._remove = tensor, remove

    def __del__(self) -> None:
        self._remove()


@contextmanager
def kept_for_backward(model: GPT) -> Iterator[Kept]:
    """Watches what autograd saves, and the hidden states that a pipeline stage keeps for their gradient."""
    kept = Kept({p.untyped_storage()._cdata for p in model.parameters()})

    def output(module: Any, arguments: Any, hidden: Tensor) -> None:
        if not state.is_last_stage():
            weakref.finalize(hidden, kept.add(hidden))

    handle = model.register_forward_hook(output)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: _Saved(t, kept.add(t)), lambda saved: saved.tensor):
        yield kept
    handle.remove()


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps what CUDA's fused kernel keeps: the input and one fp32 number a row. On a CPU torch composes the norm of
    smaller operators, which keep fp32 copies of input and output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        scaled = grad.float() * weight.float()
        grad_x = scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
        grad_weight = (grad.float() * normed).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """With norms and attention that keep what a GPU's kernels do."""
    original, longest = F.rms_norm, attention.LONGEST

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
        return _FusedRMSNorm.apply(x, weight, eps)

    F.rms_norm, attention.LONGEST = rms_norm, 0
    try:
        yield
    finally:
        F.rms_norm, attention.LONGEST = original, longest


# ---- everything that is allocated


class Allocated(TorchDispatchMode):
    """Bytes of all tensors that operators make while this is on and that are alive at a time, each storage once: what a
    CUDA allocator would count, but for what kernels take for themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, int] = {}  # tensors of a storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, given)
        return result

    def _add(self, tensor: Tensor, given: set[int]) -> None:
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if key not in self._alive:
            if key in given:  # it was there before
                return
            self._alive[key] = 0
            self._now += size
            self.peak = max(self.peak, self._now)
        self._alive[key] += 1
        weakref.finalize(tensor, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._alive[key] -= 1
        if not self._alive[key]:
            del self._alive[key]
            self._now -= size


def peaks(case: Case) -> tuple[int, int, int | None]:
    """Most bytes that are allocated in an update, an evaluation and, of a role with an output layer, in a rollout."""
    state.initialize(1, 1, seed=1)
    config = ModelConfig(restore_from="", micro_batch_size=ROWS, activations_checkpoint_granularity=case.recompute)
    model = KINDS[case.role](config, case.architecture, case.precision)
    for parameter in model.gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.make_trainable(OptimConfig(), 2)
    assert model.learner is not None
    batch = _batch(model)
    # as large as on a GPU
    with mock.patch.object(logprobs, "_CHUNK_ELEMENTS_CPU", logprobs._CHUNK_ELEMENTS_CUDA), as_on_a_gpu():
        with Allocated() as update:
            schedule.forward_backward(model.learner.ddp, batch, _loss)
        with Allocated() as evaluation:
            schedule.forward_sums(model.gpt, batch, _loss)
        if case.role == "critic":
            return update.peak, evaluation.peak, None
        with Allocated() as rollout, mock.patch.object(shapes, "pads", lambda: True):
            _generate(model.gpt)
    return update.peak, evaluation.peak, rollout.peak


# ---- the engine's cache


class _Tokenizer:
    eos_token_id = 0
    all_special_ids = (0,)

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def _generate(gpt: GPT) -> None:
    requests = [Request(Prompt(tuple(range(1, LENGTH + 1)), "", {}), index) for index in range(SLOTS)]
    length = LENGTH + NEW_TOKENS
    sampler = engine.Engine(gpt, _Tokenizer(), num_slots=SLOTS, max_sequence_length=length)
    sampler.generate(requests, SamplingParams(NEW_TOKENS, ignore_eos=True))


def _cache_bytes(gpt: GPT) -> list[int]:
    """Bytes of every cache that the engine makes, one for each group of slots."""
    caches: list[Any] = []

    class Recorded(kv_cache.KVCache):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            caches.append(self)

    with mock.patch.object(engine, "KVCache", Recorded):
        _generate(gpt)
    return [sum(t.nbytes for pair in cache._layers.values() for t in pair) for cache in caches]
