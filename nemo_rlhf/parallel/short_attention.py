"""Causal self-attention of short sequences on a CPU, from the projection's output to the input of the next one.

torch's fused kernel goes through tiles, which pays where the scores of all pairs do not fit into a cache. Where they
do, batched products over all heads are faster, backwards by half; and as splitting and rotating are part of
the function, gradients of queries, keys and values are written where the projection reads them, without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.parallel.elementwise import call
from nemo_rlhf.parallel.rotary import rotate_into

LONGEST = 160  # tokens; beyond, the fused kernel is faster forwards (docs/performance.md)


class _ShortAttention(torch.autograd.Function):
    """``mixed`` [S, B, groups, queries + 2, channels]: the queries of a group, its key and its value."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, scale: float, first: int) -> Tensor:
        length, batch, groups, heads, channels = mixed.shape
        queries, asked = heads - 2, length - first
        query = mixed.new_empty(batch, groups, queries, asked, channels)
        key = mixed.new_empty(batch, groups, length, channels)
        scaled = cos[first:] * scale, sin[first:] * scale
        rotate_into(query.permute(3, 0, 1, 2, 4), mixed[first:, ..., :queries, :], *scaled)
        rotate_into(key.permute(2, 0, 1, 3).unsqueeze(3), mixed[..., queries:-1, :], cos, sin)
        query, key = query.view(batch * groups, queries * asked, channels), key.view(batch * groups, length, channels)
        hidden = torch.full((asked, length), -torch.inf, device=mixed.device).triu_(first + 1)
        scores = torch.bmm(query, key.transpose(1, 2)).add_(hidden.repeat(queries, 1))
        weights = torch.softmax(scores, -1, out=scores)
        ctx.save_for_backward(mixed, query, key, weights, cos, sin)
        ctx.scale, ctx.first = scale, first
        answer = torch.bmm(weights, _values(mixed)).view(batch, groups, queries, asked, channels)
        return answer.permute(3, 0, 1, 2, 4).reshape(asked, batch, groups * queries * channels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        mixed, query, key, weights, cos, sin = ctx.saved_tensors
        scale, first = ctx.scale, ctx.first
        length, batch, groups, heads, channels = mixed.shape
        queries, asked = heads - 2, length - first
        grad = grad.view(asked, batch, groups, queries, channels).permute(1, 2, 3, 0, 4)
        grad = grad.reshape(batch * groups, queries * asked, channels)
        result = torch.empty_like(mixed)

        _values(result).copy_(torch.bmm(weights.transpose(1, 2), grad))
        grad_scores = torch.bmm(grad, _values(mixed).transpose(1, 2))
        torch.ops.aten._softmax_backward_data.out(grad_scores, weights, -1, weights.dtype, grad_input=grad_scores)
        grad_query = torch.bmm(grad_scores, key).view(batch, groups, queries, asked, channels).permute(3, 0, 1, 2, 4)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query).view(batch, groups, 1, length, channels)
        # the transpose of a rotation turns back
        rotate_into(result[first:, ..., :queries, :], grad_query, cos[first:] * scale, sin[first:] * -scale)
        rotate_into(result[..., queries:-1, :], grad_key.permute(3, 0, 1, 2, 4), cos, -sin)
        result[:first, ..., :queries, :] = 0
        return result, None, None, None, None


def _values(mixed: Tensor) -> Tensor:
    """[B * groups, S, channels], a view."""
    return mixed[..., -1, :].flatten(1, 2).transpose(0, 1)


def short_attention(mixed: Tensor, cos: Tensor, sin: Tensor, scale: float, first: int = 0) -> Tensor:
    """Attention that sees each place and those before it, of rotated queries and keys.

    Args:
        mixed: [S, B, groups, queries a group + 2, channels]: queries, key and value as the projection gives them.
        cos, sin: [S, 1, 1, 1, channels / 2], of the rotation (see ``rotary.rotate``).
        scale: of the scores.
        first: the first place that is answered.

    Returns:
        [S - first, B, groups * queries * channels].
    """
    return call(_ShortAttention, mixed, cos, sin, scale, first)
