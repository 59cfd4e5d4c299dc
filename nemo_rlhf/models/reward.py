"""The reward model: a transformer with a value head that scores whole texts, at their last token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nemo_rlhf.models.critic import CriticModel
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Microbatch


class RewardModel(CriticModel):
    """A critic's network, so that a critic can start from it."""

    reads = "at"

    def scores(self, microbatches: Sequence[Microbatch], like: Tensor) -> Tensor:
        """Scores [B, S] fp32 at the selected tokens, the last of each text."""

        def compute(gpt: GPT, hidden: Tensor, batch: Microbatch) -> dict[str, Tensor]:
            return {"scores": gpt.scores(hidden, batch.tokens, batch.selected)}

        return self.forward(microbatches, compute, like)["scores"]
