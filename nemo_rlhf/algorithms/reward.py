"""Reward models: compared pairs -> loss -> update (Christiano et al. 2017; Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.base import Metrics, PhaseTimer
from nemo_rlhf.algorithms.one_model import OneModel
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.config.schema import RewardModelConfig
from nemo_rlhf.data.batches import pad_tokens
from nemo_rlhf.data.order import Stream
from nemo_rlhf.losses.reward import bradley_terry_loss
from nemo_rlhf.models.reward import RewardModel
from nemo_rlhf.ops.masks import moments
from nemo_rlhf.ops.stats import mean_and_std
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Loss, Microbatch
from nemo_rlhf.types import Pair

_VALIDATION_PAIRS = 128  # that are padded together
_BINS = 10  # of predicted probabilities, for the calibration error


def pair_loss(normalizer: int) -> Loss:
    """The loss of a microbatch's pairs; ``normalizer`` as of ``bradley_terry_loss``."""

    def loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = gpt.scores(hidden, batch.tokens, batch.selected).view(-1, 2).unbind(1)
        return bradley_terry_loss(chosen, rejected, batch.fields["margins"][::2], normalizer=normalizer)

    return loss


class RewardTraining(OneModel[RewardModel]):
    place = "reward"

    def __init__(
        self,
        config: RewardModelConfig,
        tokenizer: Any,
        tokenizer_dir: Path,
        pairs: Sequence[Pair],
        validation_pairs: Sequence[Pair] = (),
    ) -> None:
        interval = config.trainer.val_check_interval if validation_pairs else 0
        run_dir, epochs = Path(config.exp_manager.explicit_log_dir), config.trainer.max_epochs
        stream = Stream(pairs, config.model.global_batch_size, config.seed, config.data.shuffle)
        max_steps = config.trainer.max_steps if epochs is None else stream.num_steps(epochs)
        super().__init__(run_dir, max_steps, interval, tokenizer, tokenizer_dir)
        self.config, self.pairs, self.validation_pairs = config, stream, validation_pairs

    def configure_model(self) -> None:
        model = self.config.model
        self.model = open_role(RewardModel, model, model.restore_from, self.config.trainer.precision, self.config.seed)
        self.model.make_trainable(model.optim, self.max_steps)

    def run_step(self, step: int) -> Metrics:
        timer = PhaseTimer()
        pairs = self.pairs.batch(step)
        tokens, mask, lengths, margins = self.batch(pairs)
        microbatches = self.model.cut(
            tokens, mask, lengths, range(0, len(lengths), 2), {"margins": margins}, together=2
        )
        with timer("update"):
            batch = {"tokens": tokens, "lengths": lengths, "margins": margins}
            sums, norm = self.learn(microbatches, pair_loss(len(pairs)), batch)
        assert self.model.learner is not None
        means = {name: value / len(pairs) for name, value in sums.items()}
        variance = means.pop("score/square") - means["score/mean"] ** 2
        return {
            **means,
            "score/std": max(variance, 0.0) ** 0.5,
            "grad_norm": norm,
            "lr": self.model.learner.last_lr,
            **timer.metrics,
            "perf/trained_tokens_per_s": int(lengths.sum()) / timer.metrics["time/update_s"],
        }

    def batch(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens [2P, S], each pair's chosen text before its rejected one; a mask of their last tokens; lengths [2P];
        and margins [2P, S]."""
        rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
        tokens, _, lengths = pad_tokens(rows, self.tokenizer.pad_token_id)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        mask[torch.arange(len(rows)), lengths - 1] = True
        margins = torch.tensor([pair.margin for pair in pairs]).repeat_interleave(2)[:, None].expand(tokens.shape)
        return tokens, mask, lengths, margins

    def validate(self) -> Metrics:
        """Loss, accuracy, margin and calibration on held-out pairs, and mean and deviation of their texts' scores.

        ``val/calibration_error`` is the expected calibration error (Naeini et al. 2015) of sigmoid(chosen - rejected)
        as the probability that people prefer what they preferred, in ten bins.
        """
        scores = torch.cat(
            [
                self._scores(self.validation_pairs[start : start + _VALIDATION_PAIRS])
                for start in range(0, len(self.validation_pairs), _VALIDATION_PAIRS)
            ]
        )
        chosen, rejected = scores.view(-1, 2).unbind(1)
        margins = torch.tensor([pair.margin for pair in self.validation_pairs])
        loss, sums = bradley_terry_loss(chosen, rejected, margins, normalizer=len(margins))
        mean, std = mean_and_std(moments(scores))
        self._remember(mean, std)
        return {
            "val/loss": float(loss),
            "val/accuracy": float(sums["accuracy"]) / len(margins),
            "val/margin": float((chosen - rejected).mean()),
            "val/calibration_error": calibration_error(torch.sigmoid(chosen - rejected)),
            "val/score_mean": mean,
            "val/score_std": std,
        }

    def _remember(self, mean: float, std: float) -> None:
        """The scale of the scores, which is stored with the model."""
        architecture = replace(self.model.architecture, score_mean=mean, score_std=std)
        self.model.architecture = self.model.gpt.architecture = architecture

    def _scores(self, pairs: Sequence[Pair]) -> Tensor:
        """[2 * pairs], chosen and rejected in turns."""
        tokens, mask, lengths, _ = self.batch(pairs)
        microbatches = self.model.cut(tokens, mask, lengths, range(len(lengths)))
        return self.model.scores(microbatches, tokens)[mask]


def calibration_error(preferred: Tensor) -> float:
    """Of predicted probabilities [N] that the preferred one of two is preferred, seen from both sides: the mean
    distance between prediction and share, over bins."""
    predicted = torch.cat([preferred, 1 - preferred])
    outcome = torch.cat([torch.ones_like(preferred), torch.zeros_like(preferred)])
    bins = (predicted * _BINS).long().clamp(max=_BINS - 1)
    total = 0.0
    for number in range(_BINS):
        if (inside := bins == number).any():
            total += float((predicted[inside].mean() - outcome[inside].mean()).abs()) * int(inside.sum())
    return total / len(predicted)
