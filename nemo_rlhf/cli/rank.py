"""What every command that uses a model begins and ends with: this process is a rank of a quiet, well-ordered job."""

from __future__ import annotations

import atexit
import logging
import sys
import warnings

import torch
import torch.distributed as dist
from nemo.utils import logging as nemo_logging

from nemo_rlhf.config.schema import BaseModelConfig, HardwareConfig
from nemo_rlhf.parallel import state, watch
from nemo_rlhf.parallel.libraries import choose_layer_spec, in_use

_NOISY = ("lightning.pytorch", "lightning.fabric", "megatron.core", "torch.distributed")
_clean = False  # whether what this process last began has ended well


def _leave() -> None:
    """Part with the other ranks at the end of the process; after a failure they may no longer answer."""
    if _clean and dist.is_initialized():
        dist.destroy_process_group()


def begin(model: BaseModelConfig, trainer: HardwareConfig, seed: int) -> None:
    """Join the other ranks, in the process groups of the model's cut. Raises ValueError where it does not fit."""
    global _clean
    _clean = False
    atexit.unregister(_leave)
    atexit.register(_leave)
    state.set_environment_for_one_process()
    state.initialize(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        seed,
        timeout_s=trainer.timeout_s,
        expert_parallel=model.expert_model_parallel_size,
    )
    torch.set_float32_matmul_precision(trainer.matmul_precision)  # containers may have allowed TF32
    # and a script that calls nemo_rlhf.train() may have set others, for a model of its own
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    watch.start(trainer.heartbeat_timeout_s)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)  # what it logs, it raises too
    nemo_logging.setLevel(nemo_logging.CRITICAL)  # its errors are raised, too; others are on how ranks were started
    nemo_logging.captureWarnings(False)  # it would hold back ours as well
    warnings.filterwarnings("ignore", module=r"(lightning|megatron|nemo|torch)\b")  # their own business
    said = kernels(model, trainer)
    if dist.get_rank():
        warnings.simplefilter("ignore")  # rank 0 says it for all
    else:
        print(f"nemo-rlhf: {said}.", file=sys.stderr)


def kernels(model: BaseModelConfig, trainer: HardwareConfig) -> str:
    """What computes a run, in one line. Raises ValueError as ``choose_layer_spec``."""
    used = in_use(choose_layer_spec(model.layer_spec))
    words = "; ".join(f"{name}: {value}" for name, value in used.items())
    return f"{words}; fp32 products: {trainer.matmul_precision} precision"


def end(code: int) -> int:
    """All ranks end together."""
    global _clean
    dist.barrier()
    watch.stop()
    _clean = True
    return code
