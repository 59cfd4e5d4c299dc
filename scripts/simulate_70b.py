"""Proves on paper that a model of 70 billion parameters can be cut as stated: no GPU, no weights, one process.

    python scripts/simulate_70b.py [--model llama3-70b] [--tp 8] [--pp 4] [--dp 2] [--ep 1] [--roles policy critic]

Every rank of the layout is built after the other, by the code that trains, with all tensors on the meta device and
process groups that answer without talking to anybody. Of what the ranks say they hold it is checked that

* the shards of a checkpoint, of weights and of optimizer states, tile every tensor exactly once, and that all other
  ranks' copies are copies of one of them;
* these tensors have as many elements as the architecture has parameters;
* each pipeline stage has the layers that the planner says, embeddings and output layer at the ends only;
* weights, gradients and optimizer of every rank take the bytes that ``nemo-rlhf plan`` says, on GPUs.

Prints a table; whatever does not hold is listed below it, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import resource
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_rlhf import device

warnings.filterwarnings("ignore", module=r"(megatron|torch)\b")
device.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica  # noqa: E402

from nemo_rlhf.cli.plan import find_architecture  # noqa: E402
from nemo_rlhf.config.architecture import Architecture  # noqa: E402
from nemo_rlhf.config.optim import OptimConfig  # noqa: E402
from nemo_rlhf.launch import parameters as planner  # noqa: E402
from nemo_rlhf.launch.parameters import Cut, RoleBytes  # noqa: E402
from nemo_rlhf.launch.work import HEAD_WIDTH, NUM_Q  # noqa: E402
from nemo_rlhf.parallel import state  # noqa: E402
from nemo_rlhf.parallel.gpt import build_gpt  # noqa: E402
from nemo_rlhf.parallel.optimizer import ModelOptimizer  # noqa: E402

META = torch.device("meta")
ROLES = ("policy", "critic", "ilql")
DTYPE = torch.bfloat16
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?")
_STATES = "optimizer.state."


@dataclass(frozen=True)
class Shard:
    """A part of the tensor ``key`` as a rank would save it. ``main``: this rank writes it, others hold copies."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    main: bool


@dataclass
class Rank:
    """What a rank holds. ``frozen``: bytes of its weights before it has an optimizer."""

    rank: int
    stage: int
    dp_rank: int
    frozen: int
    held: RoleBytes
    shards: list[Shard]


# ---- ranks, one after the other


@contextmanager
def rank_of(rank: int, cut: Cut) -> Iterator[None]:
    """This process is ``rank`` of ``cut``; collectives return at once and move nothing."""
    new_group = dist.new_group

    def silent_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    dist.init_process_group("fake", rank=rank, world_size=cut.tp * cut.pp * cut.dp, store=FakeStore())
    try:
        with mock.patch.object(dist, "new_group", silent_group):
            state.initialize(cut.tp, cut.pp, seed=1, expert_parallel=cut.ep)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def on_meta() -> Iterator[None]:
    """What is built for the device has shapes but no memory."""
    tensor_type = torch.Tensor.type

    def type_(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        named = tensor_type(tensor, *args, **kwargs)
        return named.replace("meta.", "") if isinstance(named, str) else named  # megatron compares the names

    def gather_objects(gathered: list[Any], mine: Any, group: Any = None) -> None:
        gathered[:] = [mine] * len(gathered)  # names of groups of parameters, which all ranks have alike

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(device, "torch_device", lambda: META))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: META))
        stack.enter_context(mock.patch.object(torch.Tensor, "type", type_))
        stack.enter_context(mock.patch.object(dist, "all_gather_object", gather_objects))
        stack.enter_context(META)
        yield


@contextmanager
def states_on_meta() -> Iterator[None]:
    """Optimizer states are put together on the host; counters stay real."""
    zeros, empty = torch.zeros, torch.empty

    def real_counters(*shape: Any, **how: Any) -> Any:
        return zeros(*shape, **{**how, "device": "cpu" if shape == ((),) else META})

    def without_memory(*shape: Any, **how: Any) -> Any:
        return empty(*shape, **{**how, "device": META})

    with mock.patch.object(torch, "zeros", real_counters), mock.patch.object(torch, "empty", without_memory):
        yield


def simulate(architecture: Architecture, role: Any, cut: Cut, rank: int) -> Rank:
    """Build what ``rank`` holds of a model that learns in bf16, and ask it for its checkpoint."""
    with rank_of(rank, cut), on_meta():
        gpt = build_gpt(architecture, role=role, dtype=DTYPE, sequence_parallel=cut.sequence_parallel)
        frozen = _bytes(gpt.parameters())
        weights = _shards(gpt.sharded_state_dict(metadata={"dp_cp_group": state.dp_group()}))
        with mock.patch.object(device, "is_cuda", lambda: True):  # buckets and counters as on GPUs
            learner = ModelOptimizer(gpt, OptimConfig(), 1)
            with states_on_meta():
                states = _shards(learner.sharded_state_dict(loading=True))
        buffers = [*learner.ddp.buffers, *learner.ddp.expert_parallel_buffers]
        held = RoleBytes(
            weights=_bytes(gpt.parameters()),
            gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
            optimizer=_bytes(_optimizer_tensors(learner)),
        )
        return Rank(rank, state.pp_rank(), state.dp_rank(), frozen, held, weights + states)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _optimizer_tensors(learner: ModelOptimizer) -> list[torch.Tensor]:
    """fp32 copies and moments."""
    weights = {parameter.untyped_storage()._cdata for parameter in learner.model.parameters()}
    tensors = [p for group in learner.optimizer.param_groups for p in group["params"]]
    for part in learner.optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            tensors += [value for entry in part.optimizer.state.values() for value in entry.values() if value.dim()]
    return [tensor for tensor in tensors if tensor.untyped_storage()._cdata not in weights]


def _shards(sharded_state: dict[str, Any]) -> list[Shard]:
    apply_factories(sharded_state)
    shards = []
    for part in nested_values(sharded_state):
        if isinstance(part, ShardedTensor):
            # layers are stacked along axes that the local tensor does not have
            shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
            main = is_main_replica(part.replica_id)
            shards.append(Shard(part.key, tuple(part.global_shape), tuple(part.global_offset), shape, part.dtype, main))
    return shards


# ---- what must hold


def untiled(shards: Iterable[Shard]) -> list[str]:
    """One sentence for every tensor that the shards of all ranks do not tile exactly once."""
    by_key: dict[str, list[Shard]] = defaultdict(list)
    for shard in shards:
        by_key[shard.key].append(shard)
    found = ((key, _fault(parts)) for key, parts in sorted(by_key.items()))
    return [f"{key}: {fault}." for key, fault in found if fault]


def _fault(parts: list[Shard]) -> str | None:
    if len({(part.global_shape, part.dtype) for part in parts}) > 1:
        return "ranks disagree about its shape or dtype"
    originals = [part for part in parts if part.main]
    boxes = {(part.offset, part.shape) for part in originals}
    if any((part.offset, part.shape) not in boxes for part in parts):
        return "a rank holds a part that no rank writes"
    whole = np.array(parts[0].global_shape)
    low = np.array([part.offset for part in originals])
    high = low + np.array([part.shape for part in originals])
    if (low < 0).any() or (high > whole).any():
        return f"a part lies outside of {parts[0].global_shape}"
    common = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    if (common > 0).all(-1).sum() > len(originals):
        return "two ranks write the same elements"
    missing = math.prod(parts[0].global_shape) - int((high - low).prod(-1).sum())
    return f"{missing} of its elements are written by no rank" if missing else None


def wrong_size(architecture: Architecture, role: Any, cut: Cut, shards: Iterable[Shard]) -> list[str]:
    """A sentence where the tensors of a checkpoint do not have the elements of the architecture's parameters."""
    sizes = {shard.key: math.prod(shard.global_shape) for shard in shards}
    padded = replace(architecture, vocab_size=planner.padded_vocabulary(architecture, cut.tp))
    expected = sum(p.numel for p in planner.stage_parameters(padded, role, Cut(), 0, DTYPE.itemsize))
    found = sum(size for key, size in sizes.items() if not key.startswith(_STATES))
    if found != expected:
        return [f"the checkpoint has {found} parameters, and the architecture {expected}."]
    return []


def wrong_stage(architecture: Architecture, role: Any, cut: Cut, rank: Rank) -> list[str]:
    """Sentences where a rank has other layers than its pipeline stage, or what belongs to another end of the model."""
    layers = _layers(rank.shards)
    outside = [shard.key for shard in rank.shards if not _LAYER.search(shard.key)]
    others = {"embedding" if "embedding." in key else "end" for key in outside}
    said = []
    if layers != set(planner.stage_layers(architecture, cut.pp, rank.stage)):
        said.append(f"rank {rank.rank}: stage {rank.stage} has the layers {_span(layers)}.")
    expected = {"embedding"} if rank.stage == 0 else set()
    if rank.stage == cut.pp - 1:
        tied = architecture.tie_embeddings and role not in planner.WITHOUT_OUTPUT
        expected |= {"end", "embedding"} if tied else {"end"}
    if others != expected:
        said.append(f"rank {rank.rank}: stage {rank.stage} has {sorted(others)} beside its layers.")
    return said


def wrong_bytes(architecture: Architecture, role: Any, cut: Cut, rank: Rank) -> list[str]:
    """Sentences where the planner's bytes are not those of the rank."""
    where = architecture, role, cut, rank.stage, DTYPE.itemsize
    planned = planner.role_bytes(*where, trainable=True, rank=rank.dp_rank)
    pairs = {name: (getattr(planned, name), getattr(rank.held, name)) for name in vars(planned)}
    pairs["weights without an optimizer"] = (planner.role_bytes(*where, trainable=False).weights, rank.frozen)
    return [
        f"rank {rank.rank}: {name} take {found} bytes, and {said} are planned."
        for name, (said, found) in pairs.items()
        if said != found
    ]


def _layers(shards: Iterable[Shard]) -> set[int]:
    """Numbers of the layers that these are parts of; alike layers are stacked under one key."""
    found = ((_LAYER.search(shard.key), shard.offset) for shard in shards)
    return {int(layer[1]) if layer[1] else offset[0] for layer, offset in found if layer}


# ---- the report


def _span(layers: set[int]) -> str:
    ordered = sorted(layers)
    gapless = ordered and len(ordered) == ordered[-1] - ordered[0] + 1
    return f"{ordered[0]}-{ordered[-1]}" if gapless else str(ordered)


def _row(cut: Cut, ranks: Sequence[Rank]) -> str:
    """One line for a pipeline stage: its layers, what the fullest of its ranks holds, and what they write together."""
    layers = _span(_layers(ranks[0].shards))
    most = [max(getattr(rank.held, name) for rank in ranks) for name in ("weights", "gradients", "optimizer")]
    written = sum(
        math.prod(shard.shape) * shard.dtype.itemsize for rank in ranks for shard in rank.shards if shard.main
    )
    figures = " | ".join(f"{value / 2**30:9.3f}" for value in most)
    return f"| {ranks[0].stage:5d} | {layers:>7} | {len(ranks):5d} | {figures} | {written / 1e9:10.3f} |"


def check(name: str, architecture: Architecture, role: str, cut: Cut) -> list[str]:
    """Simulate all ranks and print what they hold. Returns what does not hold, in sentences."""
    if role == "ilql":
        architecture = replace(
            architecture, ilql_num_q=NUM_Q, ilql_head_width=HEAD_WIDTH * architecture.hidden_size, heads=("ilql",)
        )
    begin = time.perf_counter()
    ranks = [simulate(architecture, role, cut, rank) for rank in range(cut.tp * cut.pp * cut.dp)]
    shards = [shard for rank in ranks for shard in rank.shards]
    print(f"{role} of {name}, bf16, TP{cut.tp} x PP{cut.pp} x DP{cut.dp} x EP{cut.ep}: {len(ranks)} ranks\n")
    print("| stage |  layers | ranks |   weights | gradients | optimizer | GB written |")
    print("|-------|---------|-------|-----------|-----------|-----------|------------|")
    for stage in range(cut.pp):
        print(_row(cut, [rank for rank in ranks if rank.stage == stage]))
    said = untiled(shards) + wrong_size(architecture, role, cut, shards)
    for rank in ranks:
        said += wrong_stage(architecture, role, cut, rank) + wrong_bytes(architecture, role, cut, rank)
    tensors = {shard.key: math.prod(shard.global_shape) for shard in shards}
    parameters = sum(size for key, size in tensors.items() if not key.startswith(_STATES))
    written = sum(shard.main for shard in shards)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"\nGiB of a rank. {len(tensors)} tensors, {parameters} parameters, {written} parts written of {len(shards)} "
        f"held: {f'{len(said)} faults' if said else 'each tensor tiled once, bytes and layers as planned'}. "
        f"{time.perf_counter() - begin:.0f} s, {peak:.0f} MiB.\n"
    )
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="python scripts/simulate_70b.py --tp 8 --pp 8 --dp 4 --roles ilql"
    )
    parser.add_argument("--model", default="llama3-70b", help="as plan.model: a shipped name or a directory")
    for name, default in (("tp", 8), ("pp", 4), ("dp", 2), ("ep", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=["policy", "critic"])
    options = parser.parse_args(arguments)
    cut = Cut(options.tp, options.pp, options.dp, options.ep, sequence_parallel=options.tp > 1)
    try:
        architecture = find_architecture(options.model)
        gc.freeze()  # megatron collects garbage for every rank, and need not look at the imported modules
        said = [fault for role in options.roles for fault in check(options.model, architecture, role, cut)]
    except ValueError as error:
        parser.error(str(error))
    for fault in said:
        print(fault)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
