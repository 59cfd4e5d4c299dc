"""Elementwise parts of a layer, in few passes over memory and with little kept for the backward pass.

Written out as autograd functions because on a CPU nothing fuses them: chained operators read and write every
intermediate, and autograd keeps most of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class _Forgetful:
    """Stands for autograd's context where nothing is kept."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def call(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply``, or where gradients are off its forward pass alone: in a decoding step autograd's bookkeeping
    takes as long as the small operators themselves."""
    if torch.is_grad_enabled():
        return function.apply(*args)  # type: ignore[no-any-return,no-untyped-call]
    return function.forward(_Forgetful(), *args)  # type: ignore[no-any-return]


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016), with which GPT-2 and Gemma were trained."""
    return F.gelu(x, approximate="tanh")


def _silu(x: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu.out(x, out=out)


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)


def _gelu_tanh(x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def _gelu_tanh_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


_Activation = Callable[[Tensor, Tensor], None]
_Derivative = Callable[[Tensor, Tensor, Tensor], None]


class _GatedUnit(torch.autograd.Function):
    """``activation(x, out)`` and ``derivative(grad, x, out)``, the gradient of its argument, write into ``out``, which
    may be ``x``. The gradient is written over the input, of which nobody else needs the values: projections keep their
    own inputs. Autograd refuses a second backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: _Activation, derivative: _Derivative) -> Tensor:
        ctx.save_for_backward(x)
        ctx.functions = activation, derivative
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
        activation(gate, result)
        return result.mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        activation, derivative = ctx.functions
        x = x.detach()
        gate, up = x.chunk(2, dim=-1)
        product, activated = torch.mul(grad, up), torch.empty_like(gate, memory_format=torch.contiguous_format)
        activation(gate, activated)
        derivative(product, gate, gate)
        torch.mul(grad, activated, out=up)
        return x, None, None


class SwiGLU(MegatronModule):
    """``silu(gate) * up`` of [..., 2 * width], gate first (Shazeer 2020); an activation module for megatron's MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return call(_GatedUnit, x, _silu, _silu_backward)


class GeGLU(MegatronModule):
    """``gelu_tanh(gate) * up`` of [..., 2 * width], gate first (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        return call(_GatedUnit, x, _gelu_tanh, _gelu_tanh_backward)


class GELU(MegatronModule):
    """``gelu_tanh`` as an activation module."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.size(-1)
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(size).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        size = x.size(-1)
        product = (grad * x).reshape(-1, size)
        grad_weight = scale.reshape(-1) @ product
        along = (product @ weight).view(scale.shape)  # of the gradient, along x
        grad_x = (grad * weight).mul_(scale)
        return grad_x.addcmul_(x, along.mul_(scale.pow(3)), value=-1 / size), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019) of [..., H]. CUDA has a kernel for it; on a CPU torch's takes twice as long
    in both directions together."""
    if x.is_cuda or x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return call(_RMSNorm, x, weight, eps)
