"""The critic: a transformer of its own with an fp32 value head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemo_rlhf.models.base import MegatronModel
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Microbatch


def token_values(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, ...]:
    """(values [N] of the states before the selected tokens,)."""
    return batch.said or (gpt.values(hidden, batch.tokens, batch.selected),)


class CriticModel(MegatronModel):
    role = "critic"
    heads = ("value",)

    def values(self, microbatches: Sequence[Microbatch], like: Tensor) -> Tensor:
        """Values [B, S] fp32 of the states before the selected tokens."""

        def compute(gpt: GPT, hidden: Tensor, batch: Microbatch) -> dict[str, Tensor]:
            return {"values": token_values(gpt, hidden, batch)[0]}

        return self.forward(microbatches, compute, like)["values"]
