"""Log-probabilities and entropies over a vocabulary that is split among tensor-parallel ranks.

The output layer is part of the computation: logits are made, used and dropped a chunk of tokens at a time, in both
directions, so the largest temporary is ``[chunk, vocabulary / TP]`` in fp32 whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rlhf import device
from nemo_rlhf.parallel import state

_CHUNK_ELEMENTS_CPU = 2**20  # 4 MiB of fp32: stays in the cache
_CHUNK_ELEMENTS_CUDA = 2**26  # 256 MiB: large enough to fill the matrix units


def _chunk_tokens(columns: int) -> int:
    elements = _CHUNK_ELEMENTS_CUDA if device.is_cuda() else _CHUNK_ELEMENTS_CPU
    return max(1, elements // max(1, columns))


class _VocabParallelScores(torch.autograd.Function):
    """(logit of the target, log-normalizer, entropy), [N] fp32 each."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``weight``: the real rows of this rank [columns, H]; ``first``: the id of its first row."""
        tokens, columns = hidden.size(0), weight.size(0)
        local = targets - first
        mine = (local >= 0) & (local < columns)
        local = torch.where(mine, local, 0)
        top = hidden.new_full((tokens,), -torch.inf, dtype=torch.float32)
        sums = hidden.new_zeros((3, tokens), dtype=torch.float32)  # sum exp, sum exp * logit, target's logit
        for start in range(0, tokens if columns else 0, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, temperature)
            top[part] = logits.amax(-1)
            sums[2, part] = torch.where(mine[part], logits.gather(-1, local[part, None]).squeeze(-1), 0.0)
            exp = (logits - top[part, None]).exp_()
            sums[0, part] = exp.sum(-1)
            sums[1, part] = exp.mul_(logits).sum(-1)
        if state.tp_size() > 1:
            best = top.clone()
            dist.all_reduce(best, op=dist.ReduceOp.MAX, group=state.tp_group())
            sums[:2] *= (top - best).exp_()
            dist.all_reduce(sums, group=state.tp_group())
            top = best
        log_normalizer = top + sums[0].log()
        entropy = log_normalizer - sums[1] / sums[0]
        ctx.save_for_backward(hidden, weight, local, mine, log_normalizer, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return sums[2], log_normalizer, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, local, mine, log_normalizer, entropy = ctx.saved_tensors
        grad_taken, grad_normalizer, grad_entropy = grads
        grad_hidden = torch.zeros_like(hidden)
        # fp32: in bf16, sums over many chunks would lose their small parts
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        for start in range(0, hidden.size(0) if weight.size(0) else 0, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            log_probs = _logits(hidden[part], weight, ctx.temperature).sub_(log_normalizer[part, None])
            probs = log_probs.exp()
            if grad_entropy is not None:  # d entropy / d logit = -p * (log p + entropy)
                grad_logits = (log_probs + entropy[part, None]).mul_(probs).mul_(-grad_entropy[part, None])
            else:
                grad_logits = torch.zeros_like(probs)
            if grad_normalizer is not None:  # d log-normalizer / d logit = p
                grad_logits.addcmul_(probs, grad_normalizer[part, None])
            if grad_taken is not None:
                grad = torch.where(mine[part, None], grad_taken[part, None], 0.0)
                grad_logits.scatter_add_(-1, local[part, None], grad)
            if ctx.temperature != 1.0:
                grad_logits.div_(ctx.temperature)
            scaled = grad_logits.to(hidden.dtype)
            grad_hidden[part] = scaled @ weight
            if grad_weight is not None:
                grad_weight += scaled.t() @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logits = fp32_product(hidden, weight)
    return logits if temperature == 1.0 else logits.div_(temperature)


def fp32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` of [N, H] and [columns, H] in fp32, summed in fp32 and not rounded to 16 bits in between
    where torch offers that: on GPUs, from 2.8 on."""
    if hidden.is_cuda and hidden.dtype != torch.float32 and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return (hidden @ weight.t()).float()


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` and entropies of their distributions, exact over all tensor-parallel ranks.

    Args:
        hidden: [N, H], the same on every rank; its gradient is this rank's share, to be summed by the caller's
            parallel region.
        weight: [padded vocabulary / TP, H], this rank's rows of the output layer.
        targets: [N] token ids.
        vocab_size: rows at and beyond it are padding and have no probability.
        temperature: divides the logits.
        chunk_tokens: tokens a chunk; by default as many as make a few MiB (CPU) or 256 MiB (CUDA) of logits.

    Returns:
        (logprobs [N], entropies [N]), both fp32.
    """
    taken, log_normalizer, entropy = _scores(hidden, weight, targets, vocab_size, temperature, chunk_tokens)
    return taken - log_normalizer, entropy


def vocab_parallel_q(
    hidden: Tensor, weight: Tensor, actions: Tensor, *, vocab_size: int, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Q values of ``actions`` and log-sum-exp over all actions; arguments as of ``vocab_parallel_logprobs``.

    Returns:
        (q_taken [N], q_logsumexp [N]), both fp32.
    """
    taken, logsumexp, _ = _scores(hidden, weight, actions, vocab_size, 1.0, chunk_tokens)
    return taken, logsumexp


def _scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, temperature: float, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    first = state.tp_rank() * weight.size(0)
    real = weight[: max(0, min(weight.size(0), vocab_size - first))]
    return _VocabParallelScores.apply(hidden, real, targets, first, temperature, chunk or _chunk_tokens(weight.size(0)))


def vocab_parallel_taken(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Outputs [N] fp32 of ``targets`` alone, the same on every tensor-parallel rank, without gradient. No other row of
    ``weight`` is read."""
    with torch.no_grad():
        local = targets - state.tp_rank() * weight.size(0)
        mine = (local >= 0) & (local < weight.size(0))
        taken = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
        taken[mine] = (hidden[mine].float() * weight[local[mine]].float()).sum(-1)
        if state.tp_size() > 1:
            dist.all_reduce(taken, group=state.tp_group())
        return taken
