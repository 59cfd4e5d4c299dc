"""Bodies on a CPU for the functions of Transformer Engine's C extension that the package reaches.

Each takes the arguments of the C function in their order; a call with others fails, as it would on a GPU. Whatever
else is asked of the extension is a ``MagicMock``.
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from torch import Tensor


class DType(enum.IntEnum):
    """Those of the extension's that Python may name, by its numbers."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class FusedAttnBackend:
    """Fused attention kernels by name; ``__members__`` are those that the newest versions know."""

    NVTE_F16_max512_seqlen, NVTE_F16_arbitrary_seqlen, NVTE_FP8, NVTE_No_Backend = 0, 1, 2, -1
    __members__ = ("NVTE_F16_arbitrary_seqlen", "NVTE_FP8", "NVTE_No_Backend")


_TORCH = {DType.kFloat32: torch.float32, DType.kBFloat16: torch.bfloat16, DType.kFloat16: torch.float16}


def _as(dtype: Any, default: torch.dtype) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else _TORCH.get(dtype, default)


# ---- matrix products


def generic_gemm(
    a: Tensor,
    transa: bool,
    b: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: Any,
    comm_type: Any,
    extra_output: Any,
    bulk_overlap: bool,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Column-major, as cuBLAS has it: rows of the result are those of ``b``."""
    assert quantizer is None and comm_overlap is None and not gelu and alpha == 1.0
    flat_a, flat_b = a.reshape(-1, a.size(-1)), b.reshape(-1, b.size(-1))
    left = flat_b.t() if transb else flat_b
    right = flat_a.t() if transa else flat_a
    result = left.float() @ right.float()
    bias_grad = None
    if bias is not None and grad:
        bias_grad = flat_b.sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if out is None:
        shape = b.shape[:-1] if not transb else left.shape[:1]
        out = result.to(_as(out_dtype, a.dtype)).view(*shape, right.size(1))
    elif accumulate:
        out.view(result.shape).add_(result.to(out.dtype))
    else:
        out.view(result.shape).copy_(result)
    return out, bias_grad, None, None


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transa: bool,
    b: Sequence[Tensor],
    transb: bool,
    out: Sequence[Tensor],
    out_dtype: Any,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_in: Sequence[Tensor],
    grad: bool,
    workspaces: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    sm_count: int,
) -> Sequence[Tensor]:
    targets = out[0].split(list(m_splits)) if single_output else out
    for left, right, target in zip(b, a, targets, strict=True):
        product = (left.t() if transb else left).float() @ (right.t() if transa else right).float()
        if accumulate:
            target.add_(product.to(target.dtype))
        else:
            target.copy_(product)
    return bias


def split_quantize(tensor: Tensor, splits: Sequence[int], quantizers: Any) -> Sequence[Tensor]:
    return tensor.split(list(splits))


# ---- norms


def _scale(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    scale = x.float().square().mean(-1).add(eps).rsqrt()
    result = (x.float() * scale[:, None] * _scale(weight, zero_centered)).to(_as(out_dtype, x.dtype))
    return result if out is None else out.copy_(result), None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    normed = x.float() * scale[:, None]
    scaled = grad.float() * _scale(weight, zero_centered)
    grad_x = scale[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad.float() * normed).sum(0).to(weight.dtype)


def layernorm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.float().mean(-1)
    scale = x.float().var(-1, unbiased=False).add(eps).rsqrt()
    normed = (x.float() - mean[:, None]) * scale[:, None]
    result = (normed * _scale(weight, zero_centered) + bias.float()).to(_as(out_dtype, x.dtype))
    return result if out is None else out.copy_(result), mean, scale


def layernorm_bwd(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    normed = (x.float() - mean[:, None]) * scale[:, None]
    scaled = grad.float() * _scale(weight, zero_centered)
    along = (scaled * normed).mean(-1, keepdim=True)
    grad_x = scale[:, None] * (scaled - scaled.mean(-1, keepdim=True) - normed * along)
    return grad_x.to(x.dtype), (grad.float() * normed).sum(0).to(weight.dtype), grad.float().sum(0).to(weight.dtype)


# ---- activations


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def unit(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    return unit


def _forward(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def forward(x: Tensor, quantizer: Any) -> Tensor:
        return function(x)

    return forward


def _backward(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Any], Tensor]:
    def backward(grad: Tensor, x: Tensor, quantizer: Any) -> Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            (result,) = torch.autograd.grad(function(inner), inner, grad)
        return result

    return backward


# ---- rotary embedding


def fused_rope_forward(
    x: Tensor,
    angles: Tensor,
    start_positions: Tensor | None,
    layout: Any,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    assert cu_seqlens is None and start_positions is None and not interleaved and cp_size == 1
    assert x.dim() == 4 and angles.dtype == torch.float32 and angles.shape[1:3] == (1, 1)
    assert angles.size(0) >= x.size(0)
    angles = angles[: x.size(0)]
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * angles.cos() + turned * angles.sin()).to(x.dtype)


def fused_rope_backward(grad: Tensor, angles: Tensor, *rest: Any) -> Tensor:
    if len(rest) == 6:  # 2.11 has start_positions, which 2.7 has not
        start_positions, *rest = rest  # type: ignore[assignment]
        assert start_positions is None
    layout, interleaved, cu_seqlens, cp_size, cp_rank = rest
    return fused_rope_forward(grad, -angles, None, layout, interleaved, cu_seqlens, cp_size, cp_rank)


# ---- many tensors at a time


def multi_tensor_adam(
    chunk_size: int,
    overflow: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    assert adam_w
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for grad, weight, first, second in zip(*lists, strict=True):
        assert grad.shape == weight.shape == first.shape == second.shape
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (first / correction1) / ((second / correction2).sqrt() + eps) + weight_decay * weight
        weight.sub_(lr * update)


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), norms


def multi_tensor_scale(chunk_size: int, overflow: Tensor, lists: Sequence[Sequence[Tensor]], factor: Any) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


_BODIES: dict[str, Callable[..., Any]] = {
    body.__name__: body
    for body in (
        generic_gemm,
        te_general_grouped_gemm,
        split_quantize,
        rmsnorm_fwd,
        rmsnorm_bwd,
        layernorm_fwd,
        layernorm_bwd,
        fused_rope_forward,
        fused_rope_backward,
        multi_tensor_adam,
        multi_tensor_l2norm,
        multi_tensor_scale,
    )
}
for _name, _function in {"swiglu": _gated(F.silu), "geglu": _gated(_gelu), "gelu": _gelu}.items():
    _BODIES |= {_name: _forward(_function), f"d{_name}": _backward(_function)}


def extension() -> types.ModuleType:
    """The module ``transformer_engine_torch``."""
    module: Any = MagicMock(name="transformer_engine_torch")
    module.__spec__ = None
    module.DType, module.NVTE_Fused_Attn_Backend = DType, FusedAttnBackend
    module.get_cudnn_version = lambda: 91300
    module.get_num_cublas_streams = lambda: 4
    for name, body in _BODIES.items():
        setattr(module, name, body)
    # what a star imports
    module.__all__ = ["get_cudnn_version", "NVTE_QKV_Layout", "NVTE_QKV_Format", *_BODIES]
    return module


# ---- attention, whose Python only chooses among kernels


def replace_attention(kind: Any) -> None:
    """Let ``DotProductAttention`` compute itself, called with whatever its own ``forward`` takes."""
    signature = inspect.signature(kind.forward)

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given: Any = types.SimpleNamespace(**bound.arguments)
        assert given.attention_mask is None and given.core_attention_bias is None
        layout = given.qkv_format or self.qkv_format
        window = self.window_size if given.window_size is None else given.window_size
        query, key, value = given.query_layer, given.key_layer, given.value_layer
        if layout == "thd":
            assert given.attn_mask_type == "padding_causal" and query.dim() == 3
            assert int(given.cu_seqlens_q[-1]) == query.size(0)
            ends = given.cu_seqlens_q.diff().tolist()
            assert given.max_seqlen_q == max(ends)
            parts = zip(*(x.unsqueeze(1).split(ends) for x in (query, key, value)), strict=True)
            return torch.cat([_causal(*part, window) for part in parts]).reshape(query.size(0), -1)
        assert layout == "sbhd" and given.attn_mask_type == "causal" and query.dim() == 4
        return _causal(query, key, value, window).reshape(*query.shape[:2], -1)

    kind.forward = forward


def _causal(query: Tensor, key: Tensor, value: Tensor, window: tuple[int, int] | None) -> Tensor:
    """[S, B, heads, channels]; ``window``: how many tokens to the left are seen, -1 for all."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    grouped = q.size(1) != k.size(1)
    if window is None or window[0] < 0:  # the fused kernel keeps what a GPU's does
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    else:
        places = torch.arange(query.size(0))
        seen = (places <= places[:, None]) & (places >= places[:, None] - window[0])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3)
