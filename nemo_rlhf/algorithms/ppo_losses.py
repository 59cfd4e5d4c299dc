"""What PPO's models compute of a microbatch to learn from it: their heads, and the losses on what these say."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_rlhf.config.schema import PPOAlgorithmConfig
from nemo_rlhf.losses.ppo import policy_loss, value_loss
from nemo_rlhf.models.critic import token_values
from nemo_rlhf.models.policy import token_logprobs
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Loss, Microbatch


def policy_objective(config: PPOAlgorithmConfig, temperature: float, kl_coef: float, normalizer: int) -> Loss:
    """``normalizer`` as of ``policy_loss``; ``kl_coef``: of GRPO's term, which has ``ref_logprobs`` in the fields."""

    def loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = token_logprobs(gpt, hidden, batch, temperature)
        return policy_loss(
            logprobs,
            batch.fields["logprobs"],
            batch.fields["advantages"],
            torch.ones_like(batch.selected, dtype=torch.bool),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            entropy=entropy if config.entropy_coef else None,
            entropy_coef=config.entropy_coef,
            ref_logprobs=batch.fields["ref_logprobs"] if config.advantage == "grpo" else None,
            kl_coef=kl_coef,
            normalizer=normalizer,
        )

    return loss


def value_objective(config: PPOAlgorithmConfig, normalizer: int) -> Loss:
    """``normalizer`` as of ``value_loss``."""

    def loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        return value_loss(
            token_values(gpt, hidden, batch)[0],
            batch.fields["values"],
            batch.fields["returns"],
            torch.ones_like(batch.selected, dtype=torch.bool),
            value_clip=config.value_clip,
            normalizer=normalizer,
        )

    return loss
