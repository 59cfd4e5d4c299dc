"""The heads of implicit language Q-learning on a language model's trunk: V, one or two Q, and what Q is learned from.

Q has a number for every action, so its last layer is split over the tensor-parallel ranks as an output layer is, and no
rank ever holds Q values of the whole vocabulary for more tokens than a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from nemo_rlhf import device
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.logprobs import fp32_product, vocab_parallel_q, vocab_parallel_taken

_SPLIT = re.compile(r"(target_)?q\.\d+\.weight")  # rows of the vocabulary
Normal = Callable[[str, tuple[int, ...]], Tensor]  # standard normal values by name and shape


@dataclass(frozen=True)
class ILQLScores:
    """What the loss of ILQL needs of every action, [N] fp32 each: see ``losses.ilql``."""

    q_taken: tuple[Tensor, ...]
    q_logsumexp: tuple[Tensor, ...]
    target_q_taken: tuple[Tensor, ...]
    values: Tensor
    logprobs: Tensor


class _Trunk(MegatronModule):
    """``relu(fc(hidden))`` [..., width], on every tensor-parallel rank alike; what V and Q heads begin with."""

    def __init__(self, config: TransformerConfig, width: int, dtype: torch.dtype) -> None:
        super().__init__(config)
        self.fc = torch.nn.Linear(config.hidden_size, width, dtype=dtype, device=device.torch_device())

    def features(self, hidden: Tensor) -> Tensor:
        return F.relu(self.fc(hidden.to(self.fc.weight.dtype)))


class VHead(_Trunk):
    """One fp32 number a token."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__(config, width, torch.float32)
        self.out = torch.nn.Linear(width, 1, dtype=torch.float32, device=device.torch_device())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.features(hidden)).squeeze(-1)


class QHead(_Trunk):
    """A number for every token of the vocabulary; ``weight`` [padded vocabulary / TP, width] is this rank's rows."""

    def __init__(self, config: TransformerConfig, width: int, vocab_rows: int, dtype: torch.dtype) -> None:
        super().__init__(config, width, dtype)
        self.weight = torch.nn.Parameter(torch.empty(vocab_rows, width, dtype=dtype, device=device.torch_device()))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim, self.weight.partition_stride = 0, 1  # type: ignore[attr-defined]

    def scores(self, hidden: Tensor, actions: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Q of ``actions`` [N] and log-sum-exp over all actions, fp32, for hidden states [N, H]."""
        features = copy_to_tensor_model_parallel_region(self.features(hidden), group=state.tp_group())
        return vocab_parallel_q(features, self.weight, actions, vocab_size=vocab_size)

    @torch.no_grad()
    def taken(self, hidden: Tensor, actions: Tensor) -> Tensor:
        """Q of ``actions`` [N] alone, fp32, without gradient."""
        return vocab_parallel_taken(self.features(hidden), self.weight, actions)

    @torch.no_grad()
    def all(self, hidden: Tensor) -> Tensor:
        """Q [N, padded vocabulary / TP] of this rank's rows, fp32, without gradient."""
        return fp32_product(self.features(hidden), self.weight)


class ILQLHeads(MegatronModule):
    """V head, ``num_q`` Q heads and their targets, all one hidden layer of ``width`` wide (trlX: twice the model's).

    Targets are fp32, because steps of ``alpha`` are below a bf16 weight's precision; they are no part of what an
    optimizer sees.
    """

    def __init__(self, config: TransformerConfig, vocab_rows: int, *, num_q: int, width: int) -> None:
        super().__init__(config)
        self.v = VHead(config, width)
        self.q: Any = torch.nn.ModuleList(QHead(config, width, vocab_rows, config.params_dtype) for _ in range(num_q))
        self.target_q: Any = torch.nn.ModuleList(QHead(config, width, vocab_rows, torch.float32) for _ in range(num_q))
        self.target_q.requires_grad_(False)

    @torch.no_grad()
    def initialise(self, normal: Normal, vocab_size: int) -> None:
        """Fresh heads that depend on ``normal`` alone, not on the cut: standard deviation 1 / sqrt(3 * inputs), torch's
        for linear layers; biases and V's last layer zero, so that values are 0 at first. Targets are copies."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1 or name == "v.out.weight":
                parameter.zero_()
            elif not name.startswith("target_q."):
                rows, inputs = parameter.shape
                is_split = _SPLIT.fullmatch(name) is not None
                whole = normal(f"ilql_heads.{name}", (vocab_size if is_split else rows, inputs)) / (3 * inputs) ** 0.5
                first = state.tp_rank() * rows if is_split else 0
                part = whole[first : first + rows]
                parameter.zero_()[: len(part)] = part
        for target, source in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
            target.copy_(source)

    @torch.no_grad()
    def sync_targets(self, alpha: float) -> None:
        """Polyak averaging: ``target += alpha * (q - target)``."""
        for target, source in zip(self.target_q.parameters(), self.q.parameters(), strict=True):
            target.lerp_(source.to(target.dtype), alpha)

    def scores(self, hidden: Tensor, actions: Tensor, logprobs: Tensor, vocab_size: int) -> ILQLScores:
        """Of ``actions`` [N] in the states ``hidden`` [N, H], which are the same on every tensor-parallel rank, and so
        is their gradient."""
        taken, logsumexp = zip(*(head.scores(hidden, actions, vocab_size) for head in self.q), strict=True)
        targets = tuple(head.taken(hidden, actions) for head in self.target_q)
        return ILQLScores(taken, logsumexp, targets, self.v(hidden), logprobs)

    @torch.no_grad()
    def advantages(self, hidden: Tensor) -> Tensor:
        """``min_i target Q_i - V`` [N, padded vocabulary / TP] of hidden states [N, H], fp32."""
        q = torch.stack([head.all(hidden) for head in self.target_q]).amin(0)
        return q - self.v(hidden)[:, None]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        tensors = self.state_dict(prefix="", keep_vars=True)
        split = {name: tensor for name, tensor in tensors.items() if _SPLIT.fullmatch(name)}
        whole = {name: tensor for name, tensor in tensors.items() if name not in split}
        result = make_sharded_tensors_for_checkpoint(whole, prefix, sharded_offsets=sharded_offsets)
        for name, tensor in split.items():  # another cut pads the vocabulary to another size
            result[f"{prefix}{name}"] = make_tp_sharded_tensor_for_checkpoint(
                tensor, f"{prefix}{name}", allow_shape_mismatch=True, prepend_offsets=sharded_offsets
            )
        return result
