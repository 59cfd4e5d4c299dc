"""A CPU that stands in for CUDA, so that unmodified megatron-core runs without a GPU.

What is replaced, and nothing else:

* the tensor factories and ``Tensor.to``/``Tensor.new_*``: a CUDA ``device=`` means the CPU, ``pin_memory`` is dropped;
* ``Tensor.cuda``, ``Tensor.pin_memory``, ``Module.cuda``: return their object;
* ``Tensor.type()``: names the CUDA type, which megatron's gradient clipping compares with;
* ``torch.cuda``: device, stream, event, memory and random-state calls;
* megatron's two random-state functions, so that its tracker (dropout, recomputation) works on CPU states;
* the copy to the host of how many tokens each expert gets, which leaves host tensors as they are instead of giving the
  arrays asked for;
* megatron's linear layer where there are no gradients: the product alone, without autograd's bookkeeping;
* apex's kernel that adds a weight's gradient to the main gradient, by a matrix product that adds to its result;
* the collectives of megatron's gradient and parameter buffers in groups of one rank, where gloo would copy everything.

Functions are replaced rather than intercepted by a TorchFunctionMode, because such a mode is switched off inside
``Tensor.backward()``, where recomputed layers create tensors again.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = [
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "linspace",
    "empty_strided",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "scalar_tensor",
]
_NEW = ["new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]
_installed = False


class _Stream:
    """A stream or event whose work is always done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, *args: Any) -> None:
        pass

    def wait_event(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    def record_event(self, *args: Any) -> _Stream:
        return _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _constant(value: Any) -> Callable[..., Any]:
    # a new function for every use: torch._dynamo refuses one object under two names
    return lambda *args, **kwargs: value


def _patch_tensor() -> None:
    tensor: Any = torch.Tensor
    original_to, original_type = tensor.to, tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], torch.Tensor | torch.dtype) and _names_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            name = original_type(self)
            # inside `with torch.device(...)`, which Lightning uses, the original comes back here first
            return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)
        args = tuple(a.replace("torch.cuda.", "torch.") if isinstance(a, str) else a for a in args)
        return original_type(self, *args, **kwargs)

    tensor.to, tensor.type = to, type_
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in _NEW:
        setattr(tensor, name, _on_cpu(getattr(tensor, name)))


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = _constant(_CPU)
    cuda.device_count = _constant(1)
    cuda.is_available = _constant(False)  # torch built with CUDA would count devices, where Lightning asks it to
    # torch's Adam looks for a CUDA graph under capture, where torch was built with CUDA
    cuda.is_current_stream_capturing = _constant(False)
    torch.optim.Optimizer._accelerator_graph_capture_health_check = _constant(None)  # type: ignore[method-assign]
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _constant(None))
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, _constant(_Stream()))
    cuda.Stream, cuda.Event = _Stream, _Stream
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _constant(None))
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _constant(0))
    cuda.memory_stats = lambda *args, **kwargs: defaultdict(int)
    cuda.mem_get_info = _constant((1 << 33, 1 << 34))
    cuda.get_device_name = _constant("cpu")
    cuda.get_device_capability = _constant((0, 0))


def _patch_random() -> None:
    import megatron.core.tensor_parallel.random as tracker

    cuda: Any = torch.cuda

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def seed(value: int) -> None:
        torch.default_generator.manual_seed(value)

    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    cuda.manual_seed = cuda.manual_seed_all = seed
    tracker._get_cuda_rng_state = get_state
    tracker._set_cuda_rng_state = set_state
    # recomputation warns that the CPU state changed: here that is the state it restores
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _patch_experts() -> None:
    import megatron.core.transformer.moe.moe_utils as utils
    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    utils.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = to_host


def _patch_linear() -> None:
    from megatron.core.tensor_parallel import layers

    learning = layers.linear_with_grad_accumulation_and_async_allreduce

    @functools.wraps(learning)
    def linear(input: torch.Tensor, weight: torch.Tensor, bias: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_grad_enabled() or kwargs["sequence_parallel"]:
            return learning(input, weight, bias, *args, **kwargs)  # type: ignore[no-any-return]
        return torch.nn.functional.linear(input, weight, bias)

    layers.linear_with_grad_accumulation_and_async_allreduce = linear


def _patch_gradients() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers
    from megatron.core.tensor_parallel import layers

    def accumulate(inputs: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        if grad.dtype == main_grad.dtype:
            main_grad.addmm_(grad.t(), inputs)
        else:
            main_grad.add_(grad.t() @ inputs)

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    buffers.dist_all_gather_func = _without_self_copies(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = _without_self_copies(buffers.dist_reduce_scatter_func)


def _without_self_copies(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective over parts of one buffer, which in a group of one rank is left where it is; one number still goes,
    because not every torch allows a coalescing manager without an operation."""

    @functools.wraps(collective)
    def wrapped(output: torch.Tensor, own: torch.Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == own.data_ptr():
            output, own = output[:1], own[:1]
        return collective(output, own, *args, group=group, **kwargs)

    return wrapped


def install() -> None:
    """Put the stand-in in place. Once per process; it stays for the life of the process."""
    global _installed
    if _installed:
        return
    # megatron-core and torch._dynamo must be imported before the patches: their imports fail on patched factories
    import torch._dynamo

    # cached at first use, and `with torch.device("meta")` (transformers' loading) must know the original factories
    torch.utils._device._device_constructors()
    torch._dynamo.config.disable = True  # megatron's jit_fuser is torch.compile, which needs a compiler on the host
    _patch_tensor()
    _patch_cuda()
    _patch_random()
    _patch_experts()
    _patch_linear()
    _patch_gradients()
    _installed = True
