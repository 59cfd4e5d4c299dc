"""The ILQL model: a language model with V and Q heads on its trunk; one megatron module, one optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.models.base import MegatronModel
from nemo_rlhf.parallel import schedule, state
from nemo_rlhf.parallel.gpt import GPT


class ILQLModel(MegatronModel):
    role = "ilql"
    heads = ("ilql",)

    def freeze(self, num_layers_unfrozen: int) -> None:
        """Let only the last ``num_layers_unfrozen`` layers, what stands behind them and the heads (with their own
        trunk, if they have one) learn; -1: all of the model; 0: the heads alone. An embedding stays as it is, tied to
        the output layer or not. To be called before ``make_trainable``."""
        if num_layers_unfrozen < 0:
            return
        self.gpt.has_frozen_layers = True
        first = self.architecture.num_layers - num_layers_unfrozen
        for name, parameter in self.gpt.named_parameters():
            if name.startswith(("ilql_heads.", "value_trunk.")):
                continue
            if name.startswith("decoder.layers."):
                number = self.gpt.decoder.layers[int(name.split(".")[2])].layer_number - 1
                parameter.requires_grad_(number >= first)
            else:
                is_tied = name.startswith("output_layer.") and self.architecture.tie_embeddings
                is_above = not (name.startswith("embedding.") or is_tied)
                parameter.requires_grad_(num_layers_unfrozen > 0 and is_above)
        if self.gpt.pre_process:
            # gradients pass pipeline stages in which nothing learns: their output must want one
            self.gpt.embedding.register_forward_hook(_wants_gradient)

    def sync_targets(self, alpha: float) -> None:
        """Polyak averaging of the target heads; on stages without heads nothing."""
        if self.gpt.ilql_heads is not None:
            self.gpt.ilql_heads.sync_targets(alpha)

    def action_values(self, microbatches: Sequence[schedule.Microbatch], like: Tensor) -> dict[str, Tensor]:
        """Of the selected tokens, [B, S] fp32 each: "Q" (mean of the heads), "target Q" (the lower one) and "V"."""

        def compute(gpt: GPT, hidden: Tensor, batch: schedule.Microbatch) -> dict[str, Tensor]:
            scores = gpt.ilql_scores(hidden, batch.tokens, batch.selected, detach=True)
            return {
                "Q": torch.stack(tuple(scores.q_taken)).mean(0),
                "target Q": torch.stack(tuple(scores.target_q_taken)).amin(0),
                "V": scores.values,
            }

        return self.forward(microbatches, compute, like)

    def sums(self, microbatches: Sequence[schedule.Microbatch], loss: schedule.Loss) -> dict[str, float]:
        """The logged sums of a loss over the whole batch, without learning from it."""
        parts = state.gather_objects(schedule.forward_sums(self.gpt, microbatches, loss))
        names = sorted(set().union(*parts))
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def _wants_gradient(module: Any, arguments: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()
