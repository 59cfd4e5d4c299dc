"""The policy: a language model that is sampled from and learns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemo_rlhf.models.base import MegatronModel
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Microbatch


class PolicyModel(MegatronModel):
    role = "policy"

    def logprobs(self, microbatches: Sequence[Microbatch], temperature: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the selected tokens, and entropies where they were drawn: [B, S] fp32 each."""

        def compute(gpt: GPT, hidden: Tensor, batch: Microbatch) -> dict[str, Tensor]:
            logprobs, entropy = gpt.vocab_logprobs(hidden, batch.tokens, batch.selected, temperature)
            return {"logprobs": logprobs, "entropy": entropy}

        results = self.forward(microbatches, compute, like)
        return results["logprobs"], results["entropy"]
