"""The policy: a language model that is sampled from and learns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemo_rlhf.models.base import MegatronModel
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Microbatch


def token_logprobs(gpt: GPT, hidden: Tensor, batch: Microbatch, temperature: float) -> tuple[Tensor, ...]:
    """(log-probabilities, entropies) of the selected tokens, [N] each."""
    return batch.said or gpt.vocab_logprobs(hidden, batch.tokens, batch.selected, temperature)


class PolicyModel(MegatronModel):
    role = "policy"

    def logprobs(self, microbatches: Sequence[Microbatch], temperature: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the selected tokens, and entropies where they were drawn: [B, S] fp32 each."""

        def compute(gpt: GPT, hidden: Tensor, batch: Microbatch) -> dict[str, Tensor]:
            logprobs, entropy = token_logprobs(gpt, hidden, batch, temperature)
            return {"logprobs": logprobs, "entropy": entropy}

        results = self.forward(microbatches, compute, like)
        return results["logprobs"], results["entropy"]
