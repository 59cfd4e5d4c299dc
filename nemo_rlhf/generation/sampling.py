"""Drawing the next token, so that it depends on nothing but the logits and on whose token it is.

The noise of a vocabulary entry is a function of (seed, sample index, position, vocabulary id) alone: a counter-based
generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") instead of a random state. So the sampled
tokens do not change with the tensor-, pipeline- or data-parallel cut, with the number of slots or with the order of
requests, and a resumed run draws what the uninterrupted one would have drawn.

Sampling from softmax(logits / T) is a race: the winner is argmax_v logits_v / T - log E_v with independent E_v ~ Exp(1)
(the Gumbel-max trick, Yellott 1977). Each tensor-parallel rank races its own vocabulary entries, and the ranks compare
winners: one number and one id a row travel, never the logits. Only a top-p without a top-k gathers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

INVALID_TOKEN = -1  # drawn where the logits are NaN


@dataclass(frozen=True)
class SamplingParams:
    """How a continuation is drawn and when it ends. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 filter
    nothing. ``beta`` > 0 adds ``beta * (Q - V)`` to the log-probabilities of an ILQL model before anything else, where
    an advantage counts at most +-``adv_clip``. Generation ends after a token of ``data.chat_format.response_ends``
    (unless ``ignore_eos``), one of ``stop_token_ids``, the one that completes one of the ``stop`` strings, in which
    special tokens count by their names, or after ``max_new_tokens``.

    Raises:
        ValueError: a value is out of its range.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    beta: float = 0.0
    adv_clip: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"generation.max_new_tokens={self.max_new_tokens}: at least one token must be asked for.")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"generation.temperature={self.temperature}: give 0 (greedy) or a positive number.")
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"generation.beta={self.beta}: give 0 (no guidance) or a positive number.")
        if self.top_k < 0:
            raise ValueError(f"generation.top_k={self.top_k}: give 0 (off) or the number of tokens to keep.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"generation.top_p={self.top_p}: give a probability above 0, up to 1 (off).")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"generation.stop={self.stop!r}: give a list of strings that are not empty.")
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in self.stop_token_ids):
            raise ValueError(f"generation.stop_token_ids={self.stop_token_ids!r}: give a list of token ids.")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "stop", tuple(self.stop))  # a list is what a configuration file holds


def sample_tokens(
    logits_shard: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    sampling: SamplingParams,
    sample_index: Tensor,
    position: Tensor,
    group: Any = None,
) -> Tensor:
    """Draw one token a row, the same on every rank of ``group``.

    Args:
        logits_shard: [n, padded vocabulary / TP], this rank's columns, any float type.
        vocab_start: vocabulary id of the first column.
        vocab_size: without padding; columns of ids from here on are never drawn.
        sampling: temperature first, then top-k, then top-p over what top-k left. Logits equal to the last one kept
            are kept too, so that a filter does not depend on an order among equals.
        sample_index: [n] int64.
        position: [n] int64, place of the token in its sequence.
        group: tensor-parallel process group; None where the shard is the whole vocabulary.

    Returns:
        [n] int64 token ids; greedy ties go to the lowest. INVALID_TOKEN where a logit is NaN.
    """
    width = min(max(vocab_size - vocab_start, 0), logits_shard.size(1))
    logits = logits_shard[:, :width].float()
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
        if filters(sampling, vocab_size):
            shared = _all_gather(candidates(logits, logits_shard.size(1), sampling), group)
            logits = logits.masked_fill(logits < cutoff(torch.cat(list(shared), dim=1), sampling), -torch.inf)
        logits = add_noise(logits, row_keys(sampling.seed, sample_index, position), vocab_start)
    return winner(_all_gather(local_best(logits, vocab_start), group))


def filters(sampling: SamplingParams, vocab_size: int) -> bool:
    return sampling.top_p < 1.0 or 0 < sampling.top_k < vocab_size


def candidates(logits: Tensor, padded_width: int, sampling: SamplingParams) -> Tensor:
    """What one rank tells the others for a filter's cut-off: its top-k logits, or all. [n, the same on all ranks]"""
    count = min(sampling.top_k or padded_width, padded_width)
    if sampling.top_k and logits.size(1) > count:
        return logits.topk(count, dim=1).values
    return torch.nn.functional.pad(logits, (0, count - logits.size(1)), value=-torch.inf)


def cutoff(gathered: Tensor, sampling: SamplingParams) -> Tensor:
    """The smallest logit [n, 1] that top-k, then top-p keep, of all ranks' candidates [n, c]. Top-p keeps the fewest
    tokens whose probabilities sum to at least ``top_p`` (Holtzman et al. 2020)."""
    if 0 < sampling.top_k < gathered.size(1):
        values = gathered.topk(sampling.top_k, dim=1).values
    elif sampling.top_p < 1.0:
        values = gathered.sort(dim=1, descending=True).values
    else:
        values = gathered.amin(dim=1, keepdim=True)
    if sampling.top_p >= 1.0:
        return values[:, -1:]
    probabilities = values.softmax(dim=1)
    kept = (probabilities.cumsum(dim=1) - probabilities < sampling.top_p).sum(dim=1, keepdim=True)
    return values.gather(1, kept.clamp_min(1) - 1)


def local_best(scores: Tensor, vocab_start: int) -> Tensor:
    """Best score and its id [n, 2] of one rank's columns; fp64 holds both exactly."""
    if scores.size(1) == 0:  # a shard of nothing but padding
        return scores.new_tensor([-torch.inf, vocab_start], dtype=torch.float64).repeat(scores.size(0), 1)
    best, column = scores.max(dim=1)
    return torch.stack((best.double(), (column + vocab_start).double()), dim=1)


def winner(bests: Tensor) -> Tensor:
    """Ids [n] of the best of all ranks' bests [ranks, n, 2]. Ranks are ordered as ids are: ties go to the lowest."""
    best, rank = bests[..., 0].max(dim=0)
    ids = bests[..., 1].gather(0, rank[None])[0].long()
    return torch.where(best.isnan(), INVALID_TOKEN, ids)


def _all_gather(tensor: Tensor, group: Any) -> Tensor:
    """[ranks, *shape of tensor]."""
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1:
        return tensor[None]
    gathered = tensor.new_empty((size * tensor.size(0), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered.view(size, *tensor.shape)


# Counter-based noise. Integer arithmetic wraps alike on every device, so all of them see the same bits.


def row_keys(seed: int, sample_index: Tensor, position: Tensor) -> Tensor:
    """A well-mixed 64-bit key a row [n] int64 of what names the row's token."""
    key = _mix64(sample_index + _signed64(seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019))
    return _mix64(key + position * _signed64(0x9E3779B97F4A7C15))


def add_noise(logits: Tensor, keys: Tensor, vocab_start: int) -> Tensor:
    """logits - log E [n, width], E ~ Exp(1), one independent draw for every (key, vocabulary id)."""
    halves = keys.contiguous().view(torch.int32).view(-1, 2)
    bits = _vocabulary_hash(vocab_start, logits.size(1), logits.device) ^ halves[:, :1]
    bits *= halves[:, 1:] | 1  # a multiplier of its own for every row, odd: a bijection
    for shift, multiplier in _ROUNDS:
        high = bits >> shift
        high &= (1 << (32 - shift)) - 1  # the shift keeps the sign: the mask makes it a logical one
        bits ^= high
        bits *= multiplier
    bits &= 0x7FFFFFFF
    # -u in [-(1 - 2^-24), -2^-33]: dense near 0, where unlikely tokens win, and never -1, whose logarithm is infinite
    uniform = bits.float().mul_(-(2.0**-31) * (1 - 2.0**-24)).sub_(2.0**-33)
    noise = uniform.log1p_().neg_().log_()
    return torch.sub(logits, noise, out=noise)


# of the 32-bit finaliser "lowbias32" (C. Wellons); multipliers as int32
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))


@lru_cache(maxsize=4)
def _vocabulary_hash(start: int, width: int, device: torch.device) -> Tensor:
    """A fixed, well-mixed int32 for every vocabulary id [1, width]."""
    with torch.inference_mode(False):
        ids = torch.arange(start, start + width, device=device)
        return _mix64(ids).view(torch.int32).view(-1, 2)[None, :, 0].contiguous()


def _mix64(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014; constants of Stafford's Mix13) on int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed64(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _signed64(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _signed64(value: int) -> int:
    """The two's-complement reading of a non-negative integer's low 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >> 63 else value
