"""Rotary position embedding (Su et al. 2021): angles are prepared once for a pass and shared by its layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb
from torch import Tensor

from nemo_rlhf.parallel.elementwise import call


class Rotation:
    """Turns queries and keys by the angles of their positions.

    Args:
        angles: [S, B or 1, 1, channels] fp32, as megatron makes them: both halves hold the same.
        dtype: of the queries and keys.
        fused: by Transformer Engine's kernel, which takes sines and products in fp32; otherwise by ``rotate``.
    """

    def __init__(self, angles: Tensor, dtype: torch.dtype, fused: bool) -> None:
        self._angles = angles if fused else None
        if not fused:
            half = angles[..., : angles.size(-1) // 2]
            self.cos, self.sin = half.cos().to(dtype), half.sin().to(dtype)

    def turn(self, x: Tensor, first: int = 0) -> Tensor:
        """``x`` [S - first, B, heads, channels], whose first place is number ``first``."""
        if self._angles is None:
            return rotate(x, self.cos[first:], self.sin[first:])
        angles = self._angles[first:]
        if angles.size(1) == 1:
            return fused_apply_rotary_pos_emb(x, angles)  # type: ignore[no-any-return]
        # the kernel knows one angle a place: rows with positions of their own become places
        turned = fused_apply_rotary_pos_emb(x.flatten(0, 1).unsqueeze(1), angles.flatten(0, 1).unsqueeze(1))
        return turned.view(x.shape)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None  # the transpose of a rotation turns back


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate_into(result, x, cos, sin)
    return result


def rotate_into(result: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """``rotate`` without autograd, into a tensor of the same shape that does not overlap ``x``."""
    first, second = x.chunk(2, dim=-1)
    left, right = result.chunk(2, dim=-1)
    torch.mul(x, torch.cat([cos, cos], dim=-1), out=result)
    left.addcmul_(second, sin, value=-1)
    right.addcmul_(first, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) in halves: channel i turns with channel i + channels / 2.

    Args:
        x: [S, B, heads, channels].
        cos, sin: [S or 1, 1 or B, 1, channels / 2], in the dtype of ``x``.
    """
    return call(_Rotate, x, cos, sin)
