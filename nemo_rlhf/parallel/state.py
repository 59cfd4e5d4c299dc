"""Process groups: which rank holds which part of the model and of the data.

A thin reading of megatron-core's ``parallel_state``, plus gloo groups for what is small and lives on the host
(sampled tokens, rewards, errors): they never share a communicator with the tensors of the device.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nemo_rlhf import device
from nemo_rlhf.parallel import meeting

_stage_control: Any = None
_model_control: Any = None
_expert_control: Any = None
_sizes: tuple[int, int, int] | None = None


def initialize(
    tensor_parallel: int, pipeline_parallel: int, seed: int, timeout_s: int = 1800, *, expert_parallel: int = 1
) -> None:
    """Set up every group for a TP x PP x DP cut of the world; DP is what is left.

    Experts are shared by ``expert_parallel`` neighbours among the TP x DP ranks of a stage: tensor-parallel ranks
    first, then those of other replicas (``shares_experts``), which then have to go through the model together.

    torch.distributed is initialised from the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) when it is not
    yet. A second call with other sizes cuts the same world anew.

    Raises:
        ValueError: the world size is not a multiple of TP x PP, or its stages' ranks cannot be grouped for experts.
    """
    global _sizes
    device.install()
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        meeting.join(device.backend(), timeout)
        _meet()
    world, model_ranks = dist.get_world_size(), tensor_parallel * pipeline_parallel
    if world % model_ranks:
        raise ValueError(
            f"{world} processes cannot hold tensor_model_parallel_size={tensor_parallel} x "
            f"pipeline_model_parallel_size={pipeline_parallel}: start a multiple of {model_ranks}."
        )
    _check_expert_parallel(expert_parallel, tensor_parallel, world // pipeline_parallel)
    sizes = (tensor_parallel, pipeline_parallel, expert_parallel)
    if _sizes != sizes or not ps.model_parallel_is_initialized():
        ps.destroy_model_parallel()
        ps.initialize_model_parallel(
            tensor_parallel,
            pipeline_parallel,
            expert_model_parallel_size=expert_parallel,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]  # it makes a timedelta of it
        )
        _make_control_groups(tensor_parallel, pipeline_parallel, timeout)
        if expert_parallel > tensor_parallel:
            _make_expert_control_group(expert_parallel, pipeline_parallel, timeout)
        _sizes = sizes
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _meet() -> None:
    """Form the communicator of all ranks now: a device that two of them share, or a broken network, shows at once.

    ``device_id`` of ``init_process_group`` would do so, too, but then every later group, also of gloo, is a split of
    this one in which all ranks take part, and NeMo RL took it back because its 70B was slower with it (its #3073).
    """
    ranks = torch.ones(1, device=device.torch_device())
    dist.all_reduce(ranks)
    assert int(ranks) == dist.get_world_size()


def _check_expert_parallel(expert_parallel: int, tensor_parallel: int, stage_ranks: int) -> None:
    # a group for experts is a part of a replica's stage or those of several replicas
    if stage_ranks % expert_parallel or (expert_parallel % tensor_parallel and tensor_parallel % expert_parallel):
        raise ValueError(
            f"expert_model_parallel_size={expert_parallel} must divide the {stage_ranks} processes of a pipeline "
            f"stage, and divide tensor_model_parallel_size={tensor_parallel} or be a multiple of it."
        )


def _make_control_groups(tensor_parallel: int, pipeline_parallel: int, timeout: timedelta) -> None:
    global _stage_control, _model_control
    generator = ps.RankGenerator(
        tp=tensor_parallel,
        ep=1,
        dp=dist.get_world_size() // (tensor_parallel * pipeline_parallel),
        pp=pipeline_parallel,
        cp=1,
        order="tp-cp-ep-dp-pp",
    )
    # every rank must take part in the creation of every group
    for ranks in generator.get_ranks("pp"):
        group = dist.new_group(ranks, timeout=timeout, backend="gloo")
        if dist.get_rank() in ranks:
            _stage_control = group
    for ranks in generator.get_ranks("tp-pp"):
        group = dist.new_group(ranks, timeout=timeout, backend="gloo")
        if dist.get_rank() in ranks:
            _model_control = group


def _make_expert_control_group(expert_parallel: int, pipeline_parallel: int, timeout: timedelta) -> None:
    global _expert_control
    data_parallel = dist.get_world_size() // (expert_parallel * pipeline_parallel)
    generator = ps.RankGenerator(
        tp=1, ep=expert_parallel, dp=data_parallel, pp=pipeline_parallel, cp=1, order="tp-cp-ep-dp-pp"
    )
    for ranks in generator.get_ranks("ep"):
        group = dist.new_group(ranks, timeout=timeout, backend="gloo")
        if dist.get_rank() in ranks:
            _expert_control = group


def set_environment_for_one_process() -> None:
    """Let ``initialize`` work in a process that no launcher started."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    # port 0: the store of a world of one asks the system for a free one
    os.environ.setdefault("MASTER_PORT", "0")


def tp_rank() -> int:
    return ps.get_tensor_model_parallel_rank()


def tp_size() -> int:
    return ps.get_tensor_model_parallel_world_size()


def tp_group() -> Any:
    return ps.get_tensor_model_parallel_group()


def pp_rank() -> int:
    return ps.get_pipeline_model_parallel_rank()


def pp_size() -> int:
    return ps.get_pipeline_model_parallel_world_size()


def pp_group() -> Any:
    return ps.get_pipeline_model_parallel_group()


def dp_rank() -> int:
    return ps.get_data_parallel_rank()


def dp_size() -> int:
    return ps.get_data_parallel_world_size()


def dp_group() -> Any:
    return ps.get_data_parallel_group()


def expert_dp_group() -> Any:
    """Ranks that hold the same experts: not those that hold the same of everything else."""
    return ps.get_expert_data_parallel_group()


def stage_group() -> Any:
    """All ranks of this pipeline stage: those that hold the same of a parameter are among them, experts or not."""
    return ps.get_tensor_and_data_parallel_group()


def ep_rank() -> int:
    return ps.get_expert_model_parallel_rank()


def ep_size() -> int:
    return ps.get_expert_model_parallel_world_size()


def shares_experts() -> bool:
    """Whether this replica holds some of the experts only, and others of its data-parallel group the rest."""
    return ep_size() > tp_size()


def max_over_shared_experts(value: int) -> int:
    """The largest ``value`` of the replicas that hold each other's experts; each stage asks for itself."""
    if not shares_experts():
        return value
    box = torch.tensor(value, dtype=torch.long, device="cpu")
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=_expert_control)
    return int(box)


def anywhere(value: bool) -> bool:
    """Whether it is true on any rank of the world, all of which ask."""
    box = torch.tensor(float(value), device=device.torch_device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box)


def is_first_stage() -> bool:
    return ps.is_pipeline_first_stage()


def is_last_stage() -> bool:
    return ps.is_pipeline_last_stage()


def control_group() -> Any:
    """Gloo group of the pipeline stages that share this rank's tensor- and data-parallel place."""
    return _stage_control


def is_model_leader() -> bool:
    """Whether this rank speaks for its model-parallel group: first stage, tensor-parallel rank 0."""
    return tp_rank() == 0 and pp_rank() == 0


def share_object(value: Any) -> Any:
    """The model-parallel leader's ``value``, on every rank that holds a part of the same replica."""
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=_model_control)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every data-parallel rank, in their order, on all of them."""
    gathered: list[Any] = [None] * dp_size()
    dist.all_gather_object(gathered, value, group=ps.get_data_parallel_group_gloo())
    return gathered


def sum_over_data_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor: the sum over data-parallel ranks. Takes host tensors, in their own precision."""
    total = tensor.detach().cpu().clone()
    dist.all_reduce(total, group=ps.get_data_parallel_group_gloo())
    return total


def max_over_data_parallel(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor: the maximum over data-parallel ranks. Takes host tensors."""
    total = tensor.detach().cpu().clone()
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=ps.get_data_parallel_group_gloo())
    return total


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's host tensor, on every stage. All stages pass one of the same shape and dtype."""
    if pp_size() > 1:
        dist.broadcast(tensor, group_src=pp_size() - 1, group=_stage_control)
    return tensor
