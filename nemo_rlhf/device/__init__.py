"""The device that a rank computes on: its CUDA device, or a CPU that stands in for one.

megatron-core asks for CUDA throughout. On a machine without it, ``install()`` puts the stand-in of ``device.cpu`` in
place, so that the very same megatron-core code runs on the CPU over gloo. With CUDA nothing is changed.
"""

from __future__ import annotations

import os
import resource
import sys
import weakref
from typing import Any

import torch

# Asked once: the stand-in answers torch.cuda questions itself later on.
_CUDA = torch.cuda.is_available()


def is_cuda() -> bool:
    return _CUDA


def install() -> None:
    """Make this process ready for megatron-core. Call before any of its modules is built; again is harmless."""
    if _CUDA:
        # modulo: SLURM may show each rank of a node its own device only
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        # NaN gradients and wrong tokens with masks (pytorch issues 196678 and 193893), and a plan for every new shape
        torch.backends.cuda.enable_cudnn_sdp(False)
    else:
        from nemo_rlhf.device import cpu

        cpu.install()


def torch_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if _CUDA else torch.device("cpu")


def backend() -> str:
    """Name of the torch.distributed backend for tensors on this device."""
    return "nccl" if _CUDA else "gloo"


def pinned_empty(num_bytes: int) -> torch.Tensor:
    """Host memory [num_bytes] uint8 that a GPU copies from and to by itself; on a CPU, plain memory.

    PyTorch's own pinned memory is rounded up to a power of two: of a few large buffers, a third more than is needed.

    Raises:
        RuntimeError: CUDA cannot lock so much memory.
    """
    memory = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
    if _CUDA and num_bytes:
        runtime: Any = torch.cuda.cudart()
        address = memory.data_ptr()
        if (code := int(runtime.cudaHostRegister(address, num_bytes, 0))) != 0:
            raise RuntimeError(
                f"CUDA cannot lock {num_bytes / 2**30:.1f} GiB of host memory (error {code}): raise the limit of "
                "locked memory (ulimit -l unlimited), or offload less."
            )
        # before the memory is freed; when Python ends, CUDA may be gone already
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return memory


def synchronize() -> None:
    """Wait until queued work is done, so that a host clock may be read."""
    if _CUDA:
        torch.cuda.synchronize()


def peak_memory_mib() -> float:
    """Peak memory so far in MiB: device allocations with CUDA, otherwise the resident set of this process."""
    if _CUDA:
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
