"""Variables that torch, NCCL, gloo and CUDA read when they start, given a good value where nobody has set them.

Every rank sets them in its own process, before it imports torch. They are then the same however it was started (by this
program, srun or torchrun, inside a container or not), and what a user, a job script or an image has set stays.
"""

from __future__ import annotations

import os
import socket
import tempfile
from importlib.metadata import version
from pathlib import Path

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # from torch 2.9 on, and before


def set_defaults(tensor_parallel: int = 1) -> None:
    """Set each variable that is not set; ``tensor_parallel`` ranks share each layer."""
    env = os.environ
    if not any(name in env for name in _ALLOCATOR):
        # lengths vary from batch to batch, and models come and go: fixed segments would fragment
        env.update(dict.fromkeys(_ALLOCATOR, "expandable_segments:True"))
    if "GLOO_SOCKET_IFNAME" not in env and (name := _interface(env.get("NCCL_SOCKET_IFNAME", ""))):
        env["GLOO_SOCKET_IFNAME"] = name
    if tensor_parallel > 1:
        # megatron-core counts on it to start a layer's communication before the weights' gradients, which are to hide
        # it; without tensor parallelism it would only keep independent kernels from overlapping
        env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if tuple(int(part) for part in version("torch").split(".")[:2]) < (2, 8):  # torch's own defaults from then on
        env.setdefault("TORCH_NCCL_AVOID_RECORD_STREAMS", "1")
        env.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    caches = node_local_caches()
    env.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))


def node_local_caches() -> Path:
    """Where kernels that this job compiles are kept: never on a file system that hundreds of ranks write to at once."""
    job = os.environ.get("SLURM_JOB_ID")
    return Path(tempfile.gettempdir()) / "-".join(["nemo-rlhf", str(os.getuid()), *([job] if job else [])])


def _interface(nccl: str) -> str | None:
    """The interface that a value of NCCL_SOCKET_IFNAME names, which may also be a list, a prefix or an exclusion."""
    name = nccl.removeprefix("=")
    return name if name in (known for _, known in socket.if_nameindex()) else None
