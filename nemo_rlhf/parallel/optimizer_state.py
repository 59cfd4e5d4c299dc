"""An optimizer's state in checkpoints: each tensor of it belongs to one data-parallel rank, which writes and reads it.

megatron-core's distributed optimizer has a slice of every gradient bucket on each data-parallel rank. Its layout
``fully_reshardable`` stores the state by parameters, so any TP x PP x DP cut can read it, but in 0.16.1 every rank
gathers all of it on the host for that. Here ranks send slices to the owners alone, and back after a load.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from nemo_rlhf import device

# How optimizer state is laid out in a checkpoint: any other TP x PP x DP cut can read it.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

_KEYS = ("param", "exp_avg", "exp_avg_sq")
_Owners = dict[tuple[Any, str], int]  # of the state of a parameter that a key names


class _Slice(NamedTuple):
    """Elements ``start`` to ``end`` of a parameter, whose state is at the data-parallel rank ``holder``."""

    parameter: Any
    holder: int
    start: int
    end: int


def mend_gathering() -> None:
    """Replace megatron-core 0.16.1's way from slices to parameters and back. It also leaves out the padding between
    buckets, and then looks parameters up where they are with it: one parameter's state is saved as another's.
    """
    DistributedOptimizer.sharded_param_state_fully_reshardable = _sharded_state
    DistributedOptimizer.load_parameter_state_from_fully_reshardable = _load


def _sharded_state(
    self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
) -> dict[Any, Any]:
    """What this rank writes or reads, as megatron describes it, by the parameters' numbers."""
    parts = nested_values(extract_sharded_tensors_and_factories(model_sharded_state_dict)[0])
    described = {part.data: part for part in parts}
    # of replicas in other groups one writes, but all read
    replicas = {parameter: (*part.replica_id[:2], 0) for parameter, part in described.items()}
    parameters = _parameters(self)
    owners = _owners(self, [p for p in parameters if is_loading or is_main_replica(replicas[p])])
    rank = self.data_parallel_group.rank()
    mine = {
        place: torch.empty(place[0].numel(), dtype=torch.float32, device="cpu")
        for place, owner in owners.items()
        if owner == rank
    }
    if not is_loading:
        _gather(self, owners, mine)
    # megatron loads nothing where it finds nothing, but other ranks may have what this one holds
    found: dict[Any, Any] = {"owner": LocalNonpersistentObject(rank)} if is_loading else {}
    for number, parameter in enumerate(parameters):
        for key in _KEYS:
            if (data := mine.get((parameter, key))) is not None:
                part = described[parameter]
                found.setdefault(number, {})[key] = replace(
                    part,
                    key=f"optimizer.state.{key}.{part.key}",
                    data=data.view(parameter.shape),
                    replica_id=replicas[parameter],
                    **({} if isinstance(part, ShardedTensorFactory) else {"dtype": data.dtype}),
                )
    return found


@torch.no_grad()
def _load(self: Any, state_dict: dict[Any, Any]) -> None:
    parameters = _parameters(self)
    owners = _owners(self, parameters)
    numbers = {parameter: number for number, parameter in enumerate(parameters)}
    group = self.data_parallel_group
    for slices in _slices(self):
        held: dict[Any, dict[str, Tensor]] = {}
        for key in _KEYS:
            outgoing = (
                (part.holder, state_dict[numbers[part.parameter]][key].reshape(-1)[part.start : part.end])
                for part in slices
                if owners[part.parameter, key] == group.rank()
            )
            ours = [part for part in slices if part.holder == group.rank()]
            expected = [(owners[part.parameter, key], part.end - part.start) for part in ours]
            for part, values in zip(ours, _exchange(group, outgoing, expected), strict=True):
                held.setdefault(part.parameter, {})[key] = values
        for parameter, tensors in held.items():
            self._set_main_param_and_optimizer_states(parameter, tensors)


def _parameters(optimizer: Any) -> list[Any]:
    """In megatron's order, by which checkpoints number them."""
    return [parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map]


def _owners(optimizer: Any, parameters: list[Any]) -> _Owners:
    """The largest first, each to the rank with the least so far: none has more than its share and one tensor. The same
    on all ranks."""
    loads = [0] * optimizer.data_parallel_group.size()
    owners = {}
    for parameter in sorted(parameters, key=lambda parameter: -parameter.numel()):
        for key in _KEYS:
            owner = min(range(len(loads)), key=lambda rank: loads[rank])
            owners[parameter, key] = owner
            loads[owner] += parameter.numel()
    return owners


def _slices(optimizer: Any) -> Iterable[list[_Slice]]:
    """Of each bucket, in one order on all ranks."""
    for buffer in optimizer.buffers:
        for bucket in buffer.buckets:
            share = bucket.grad_data.numel() // optimizer.data_parallel_group.size()
            slices = []
            for parameter in bucket.params_list:
                first, size = buffer.param_index_map[parameter][0] - bucket.offset, parameter.numel()
                for holder in range(first // share, (first + size - 1) // share + 1):
                    start, end = max(holder * share - first, 0), min((holder + 1) * share - first, size)
                    slices.append(_Slice(parameter, holder, start, end))
            yield slices


def _gather(optimizer: Any, owners: _Owners, mine: dict[tuple[Any, str], Tensor]) -> None:
    """Fill ``mine``, flat tensors on the host, from what all ranks hold."""
    group = optimizer.data_parallel_group
    for slices in _slices(optimizer):
        for key in _KEYS:
            outgoing = (
                (owners[part.parameter, key], optimizer._get_main_param_and_optimizer_states(part.parameter)[key])
                for part in slices
                if part.holder == group.rank() and (part.parameter, key) in owners
            )
            ours = [part for part in slices if (part.parameter, key) in mine]
            expected = [(part.holder, part.end - part.start) for part in ours]
            for part, values in zip(ours, _exchange(group, outgoing, expected), strict=True):
                mine[part.parameter, key][part.start : part.end].copy_(values)


def _exchange(group: Any, outgoing: Iterable[tuple[int, Tensor]], expected: list[tuple[int, int]]) -> list[Tensor]:
    """Send each flat tensor to a rank of ``group``.

    Args:
        expected: from which rank how many elements come, in the order in which that rank sends them.

    Returns:
        What came, in the order of ``expected``, on the device.
    """
    parts: list[list[Tensor]] = [[] for _ in range(group.size())]
    for rank, tensor in outgoing:
        parts[rank].append(tensor.detach().view(-1))
    if len(parts) == 1:
        return parts[0]
    where = device.torch_device()
    nothing = torch.empty(0, dtype=torch.float32, device=where)
    sent = torch.cat([nothing, *(tensor.to(where, torch.float32) for part in parts for tensor in part)])
    lengths = [sum(tensor.numel() for tensor in part) for part in parts]
    incoming = [sum(size for source, size in expected if source == rank) for rank in range(group.size())]
    received = torch.empty(sum(incoming), dtype=torch.float32, device=where)
    dist.all_to_all_single(received, sent, incoming, lengths, group=group)
    rests = list(received.split(incoming))
    found = []
    for source, size in expected:
        found.append(rests[source][:size])
        rests[source] = rests[source][size:]
    return found
