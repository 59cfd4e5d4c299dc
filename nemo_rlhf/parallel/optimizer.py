"""megatron's data-parallel wrapper, distributed optimizer and learning-rate schedule around one model."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from nemo_rlhf import device
from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.experts import check_trainable
from nemo_rlhf.parallel.gathering import Gathering
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.offload import Offload
from nemo_rlhf.parallel.optimizer_state import SHARDING, mend_gathering


# What follows mends 0.16.1, and 0.17 to 0.19.2 need it as it stands.
def _mend_loading() -> None:
    """megatron-core 0.16.1 loads a distributed optimizer's state as the same kind of Adam has saved it.

    Torch's AdamW counts steps in a tensor of each parameter, apex's and Transformer Engine's in a number of each group,
    and each keeps options in its groups that the others lack. With torch's, all parameters share one ``step`` after
    loading, which then advances once per parameter, and ``step`` is looked up among the tensors of a parameter.
    """
    if getattr(DistributedOptimizer, "_loading_mended", False):
        return
    original_state_dict, original_load = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    def state_dict(self: Any) -> Any:
        if self.optimizer.state:
            return original_state_dict(self)
        # a pipeline stage where nothing learns, of which megatron would read the step from torch's states
        groups = self.optimizer.state_dict()["param_groups"]
        return {"optimizer": {"param_groups": [{k: v for k, v in group.items() if k != "params"} for group in groups]}}

    def load_state_dict(self: Any, loaded: Any) -> None:
        for group in loaded["optimizer"]["param_groups"]:
            group["step"] = int(group.get("step") or 0)  # none before the first one; torch's are floating point
        original_load(self, loaded)
        for group in self.optimizer.param_groups:
            for option, value in self.optimizer.defaults.items():
                group.setdefault(option, value)
        for entry in self.optimizer.state.values():
            if isinstance(entry.get("step"), torch.Tensor):
                entry["step"] = entry["step"].clone()

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: Any) -> None:
        group, place = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][place]
        for name, value in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step" and isinstance(value, torch.Tensor):
                value.copy_(tensors[name])

    DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict = state_dict, load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer._loading_mended = True


def _mend_order(optimizer: DistributedOptimizer) -> None:
    """megatron-core 0.16.1 puts the fp32 parameters of a group before its 16-bit ones, but looks their state up by the
    order of the gradient buffers: a bf16 model with an fp32 head would save one parameter's state as another's.
    """
    groups = zip(optimizer.model_fp32_groups, optimizer.model_float16_groups, strict=True)
    for number, (full, half) in enumerate(groups):
        for place, parameter in enumerate([*full, *half]):
            optimizer.model_param_group_index_map[parameter] = (number, place)


def _accumulate_in_products(model: GPT) -> None:
    """Let products that make weights' gradients add them to the main gradients. Transformer Engine has such products on
    GPUs, and the CPU's stand-in everywhere; megatron's own layers would need apex for it."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        elif isinstance(module, ColumnParallelLinear | RowParallelLinear) and not device.is_cuda():
            module.gradient_accumulation_fusion = True


class ModelOptimizer:
    """AdamW on one model, its gradients and states sharded over the data-parallel ranks.

    ``ddp`` is the model to train: pass it to ``schedule.forward_backward``.
    """

    def __init__(self, model: GPT, config: OptimConfig, total_steps: int, overlap_param_gather: bool = False) -> None:
        """``total_steps``: optimizer steps in all, where cosine and linear schedules end. ``overlap_param_gather``: see
        ``gathering``; it does nothing without data parallelism.

        Raises:
            ValueError: the model is cut in a way that can generate and score, but not learn.
        """
        check_trainable(model)
        _mend_loading()
        mend_gathering()
        self.model, self.config = model, config
        overlaps_gather = overlap_param_gather and state.dp_size() > 1
        overlaps_reduce = overlaps_gather or (device.is_cuda() and state.dp_size() > 1)
        self.ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                overlap_grad_reduce=overlaps_reduce,
                overlap_param_gather=overlaps_gather,
                grad_reduce_in_fp32=True,
            ),
            model,
        )
        model.gathering = Gathering(self.ddp, model.layers()) if overlaps_gather else None
        _accumulate_in_products(model)
        model.config.finalize_model_grads_func = finalize_model_grads
        if overlaps_reduce:
            model.config.no_sync_func = self.ddp.no_sync
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.sched.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.betas[0],
                adam_beta2=config.betas[1],
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=model.config.bf16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=True,
                overlap_param_gather=overlaps_gather,
            ),
            [self.ddp],
        )
        self._parts = [part for part in self.optimizer.chained_optimizers if not part.is_stub_optimizer]
        for part in self._parts:
            _mend_order(part)
        self._choose_kernel()
        warmup = config.sched.warmup_steps
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.sched.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=max(total_steps, warmup + 1),
            lr_decay_style=config.sched.name,
            start_wd=config.weight_decay,
            end_wd=config.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
        self._offload: Offload | None = None
        self._num_states = 0
        self.last_lr = 0.0  # that of the last update
        self.scheduler.step(1)  # step n runs at the rate of n, so a warm-up does not begin with a step of rate 0

    def _choose_kernel(self) -> None:
        """Torch's AdamW may go through memory once; a checkpoint brings along what another device chose."""
        for part in self._parts:
            if isinstance(part.optimizer, torch.optim.AdamW):
                for group in part.optimizer.param_groups:
                    group["fused"] = True
                for entry in part.optimizer.state.values():
                    entry["step"] = entry["step"].to(device.torch_device())  # where the fused kernel wants it

    def _begin_states(self) -> None:
        """Give parameters that no step has seen yet the moments that they start with: zeros."""
        for part in self._parts:
            part.init_state_fn(part.optimizer, part.config)
            if isinstance(part.optimizer, torch.optim.AdamW):
                for entry in part.optimizer.state.values():
                    entry.setdefault("step", torch.zeros((), device=device.torch_device()))
            for group in part.optimizer.param_groups:
                if not group["params"]:  # rank 0 stores groups for all, also where it has nothing in them
                    group["step"] = self.scheduler.num_steps - 1

    def zero_grad(self) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> float:
        """Clip, apply the accumulated gradient and advance the learning rate. Returns the norm before clipping.

        A gradient that is not finite is not applied: the returned norm says so.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return norm
        for part in self._parts:
            if self.config.clip_grad > 0 and (parameters := part.get_parameters()):
                # by the norm of all: experts have an optimizer of their own
                clip_grad_by_total_norm_fp32(parameters, self.config.clip_grad, norm)
        self.last_lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step_with_ready_grads()
        if self.model.gathering is not None:
            self.model.gathering.is_stale = True
        self.scheduler.step(1)
        return norm

    def sharded_state_dict(self, loading: bool) -> dict[str, Any]:
        self._begin_states()
        # where some layers do not learn, their numbers must not be a dimension of what is stored
        metadata = {**SHARDING, "dp_cp_group": state.dp_group(), "non_homogeneous_layers": self.model.has_frozen_layers}
        model_state = self.model.sharded_state_dict(metadata=metadata)
        return self.optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)

    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        assert not self.is_offloaded
        self.optimizer.load_state_dict(loaded)
        self._choose_kernel()
        self._offload = None  # the moments are other tensors now

    def weights(self) -> list[torch.Tensor]:
        """Those of the model, and the fp32 ones that the optimizer changes: views of them, or copies."""
        self.model.settle()
        return [*self.model.parameters(), *(p for group in self.optimizer.param_groups for p in group["params"])]

    def start_anew(self) -> None:
        """Forget all steps: no moments, the model's weights in the precision that they have, the schedule's start."""
        assert not self.is_offloaded
        for part in self._parts:
            part.optimizer.state.clear()
            part.reload_model_params()
        for group in self.optimizer.param_groups:
            group.pop("step", None)  # where apex and Transformer Engine count
        self.scheduler.num_steps = 0
        self.scheduler.step(1)
        self._offload = None

    @property
    def is_offloaded(self) -> bool:
        return self._offload is not None and self._offload.is_out

    def offload(self) -> None:
        """Move the optimizer's state to host memory and free the gradient buffers."""
        states = [entry for part in self.optimizer.chained_optimizers for entry in part.optimizer.state.values()]
        if self._offload is None or len(states) != self._num_states:  # moments come into being with the first step
            main = [p for group in self.optimizer.param_groups for p in group["params"]]
            moments = [
                value
                for entry in states
                for value in entry.values()
                if isinstance(value, torch.Tensor) and value.dim() and value.device == device.torch_device()
            ]
            # in fp32 the optimizer's parameters are the model's own
            self._offload = Offload(main + moments, keep=self.model.parameters())
            self._num_states = len(states)
        self._offload.out()
        self.ddp.offload_grad_buffers()

    def restore(self) -> None:
        """Undo ``offload``; gradients are zero afterwards."""
        assert self._offload is not None
        self.ddp.restore_grad_buffers()
        self._offload.back()
