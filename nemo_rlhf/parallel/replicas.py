"""Replicas of a tensor share the work of writing and reading it: megatron-core's fully parallel strategies."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeAlias

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, merge, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.experts import EXPERTS
from nemo_rlhf.parallel.reading import TensorStrategy

_SaveStrategy: TypeAlias = FullyParallelSaveStrategyWrapper | TorchDistSaveShardedStrategy
# by the group that shares the writing, and the checksums of what all ranks hold
_strategies: dict[tuple[Any, tuple[str, ...]], _SaveStrategy] = {}


def save_strategy(sharded_state: dict[str, Any]) -> _SaveStrategy:
    """Who writes what, and a check that all is written once.

    Both take everyone's description of all tensors, and are done once for what ranks hold together: that it is the
    same again, checksums of the descriptions tell them.
    """
    apply_factories(sharded_state)
    parts, _ = extract_sharded_base(sharded_state)
    described = repr([part.without_data() for part in nested_values(parts)])
    sums = [""] * dist.get_world_size()
    dist.all_gather_object(sums, hashlib.sha256(described.encode()).hexdigest())
    # experts are replicated over others than the rest, norms also over tensor-parallel ranks: all are in here
    group = state.stage_group()
    if (strategy := _strategies.get((group, tuple(sums)))) is None:
        shared = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy(), group, do_cache_distribution=True
        )
        # here and not while saving, where a rank that fails to write would leave this group waiting
        shared.apply_saving_parallelization(parts)
        strategy = _strategies[group, tuple(sums)] = shared if group.size() > 1 else shared.base_strategy
    return strategy


def load_strategy() -> FullyParallelLoadStrategyWrapper:
    """Everyone reads a part, and sends it to those who hold the same."""
    return _LoadStrategy(TensorStrategy(), state.dp_group())


class _LoadStrategy(FullyParallelLoadStrategyWrapper):
    """Experts go by their own groups: what is read, all of a group receive, whether they asked for it or not."""

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *how: Any) -> dict[str, Any]:
        experts, rest = extract_matching_values(sharded_state_dict, lambda part: EXPERTS in part.key)
        loaded = super().load(rest, checkpoint_dir, *how)
        if state.anywhere(bool(experts)):  # a pipeline stage may have none
            groups_own = FullyParallelLoadStrategyWrapper(self.base_strategy, state.expert_dp_group())
            merge(loaded, groups_own.load(experts, checkpoint_dir, *how))
        return loaded
