"""Reward models: compared pairs or scored texts -> loss -> update (Christiano et al. 2017; Ouyang et al. 2022)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from nemo_rlhf.algorithms.base import Metrics, PhaseTimer
from nemo_rlhf.algorithms.one_model import OneModel
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.algorithms.scorer import UNMEASURED, score_texts
from nemo_rlhf.config.schema import RewardModelConfig
from nemo_rlhf.data.batches import pad_for_scores
from nemo_rlhf.data.order import Stream
from nemo_rlhf.losses.reward import bradley_terry_loss, regression_loss
from nemo_rlhf.models.reward import RewardModel
from nemo_rlhf.ops.masks import moments
from nemo_rlhf.ops.stats import correlation, mean_and_std
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Loss, Microbatch
from nemo_rlhf.types import Pair, ScoredText

_BINS = 10  # of predicted probabilities, for the calibration error

Example = TypeVar("Example", Pair, ScoredText)
Texts = list[tuple[int, ...]]


def pair_loss(normalizer: int) -> Loss:
    """The loss of a microbatch's pairs; ``normalizer`` as of ``bradley_terry_loss``."""

    def loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = gpt.scores(hidden, batch.tokens, batch.selected).view(-1, 2).unbind(1)
        return bradley_terry_loss(chosen, rejected, batch.fields["targets"][::2], normalizer=normalizer)

    return loss


def score_loss(normalizer: int) -> Loss:
    """The loss of a microbatch's scored texts; ``normalizer`` as of ``regression_loss``."""

    def loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        predicted = gpt.scores(hidden, batch.tokens, batch.selected)
        return regression_loss(predicted, batch.fields["targets"], normalizer=normalizer)

    return loss


class RewardTraining(OneModel[RewardModel], Generic[Example]):
    """The loop of both kinds. An example has ``num_texts`` texts, which stay side by side, and a target: the margin of
    a pair, the score of a text."""

    place = "reward"
    num_texts: int

    def __init__(
        self,
        config: RewardModelConfig,
        tokenizer: Any,
        tokenizer_dir: Path,
        examples: Sequence[Example],
        validation_examples: Sequence[Example] = (),
    ) -> None:
        interval = config.trainer.val_check_interval if validation_examples else 0
        run_dir, epochs = Path(config.exp_manager.explicit_log_dir), config.trainer.max_epochs
        stream: Stream[Example] = Stream(examples, config.model.global_batch_size, config.seed, config.data.shuffle)
        max_steps = config.trainer.max_steps if epochs is None else stream.num_steps(epochs)
        super().__init__(run_dir, max_steps, interval, tokenizer, tokenizer_dir)
        self.config = config
        self.examples: Stream[Example] = stream
        self.validation_examples: Sequence[Example] = validation_examples

    @abstractmethod
    def texts_of(self, examples: Sequence[Example]) -> Texts:
        """``num_texts`` of each example."""

    @abstractmethod
    def targets_of(self, examples: Sequence[Example]) -> Tensor:
        """[examples] fp32."""

    @abstractmethod
    def loss(self, normalizer: int) -> Loss:
        """Of a microbatch, whose field "targets" has each example's target once a text."""

    @abstractmethod
    def held_out(self, scores: Tensor, targets: Tensor) -> Metrics:
        """Metrics ``val/...`` of scores [examples, num_texts] and targets [examples]."""

    def configure_model(self) -> None:
        model = self.config.model
        self.model = open_role(RewardModel, model, model.restore_from, self.config.trainer.precision, self.config.seed)
        self.model.make_trainable(model.optim, self.max_steps)
        self._remember(*UNMEASURED)

    def _remember(self, mean: float, std: float) -> None:
        """The scale of the scores of these very weights, which is stored with them."""
        architecture = replace(self.model.architecture, score_mean=mean, score_std=std)
        self.model.architecture = self.model.gpt.architecture = architecture

    def run_step(self, step: int) -> Metrics:
        timer = PhaseTimer()
        examples = self.examples.batch(step)
        tokens, mask, lengths = pad_for_scores(self.texts_of(examples), self.tokenizer.pad_token_id)
        targets = self.targets_of(examples).repeat_interleave(self.num_texts)
        rows, fields = range(0, len(lengths), self.num_texts), {"targets": targets[:, None].expand(tokens.shape)}
        microbatches = self.model.cut(tokens, mask, lengths, rows, fields, together=self.num_texts)
        with timer("update"):
            batch = {"tokens": tokens, "lengths": lengths, "targets": targets}
            sums, norm = self.learn(microbatches, self.loss(len(examples)), batch)
        self._remember(*UNMEASURED)
        assert self.model.learner is not None
        means = {name: value / len(examples) for name, value in sums.items()}
        variance = means.pop("score/square") - means["score/mean"] ** 2
        return {
            **means,
            "score/std": max(variance, 0.0) ** 0.5,
            "grad_norm": norm,
            "lr": self.model.learner.last_lr,
            **timer.metrics,
            "perf/trained_tokens_per_s": int(lengths.sum()) / timer.metrics["time/update_s"],
        }

    def validate(self) -> Metrics:
        """What is held out, and mean and deviation of its texts' scores, which are stored with the model."""
        scores = score_texts(self.model, self.texts_of(self.validation_examples), self.tokenizer.pad_token_id)
        mean, std = mean_and_std(moments(scores))
        self._remember(mean, std)
        metrics = self.held_out(scores.view(-1, self.num_texts), self.targets_of(self.validation_examples))
        return {**metrics, "val/score_mean": mean, "val/score_std": std}


class PairTraining(RewardTraining[Pair]):
    """Bradley-Terry, on what people compared."""

    num_texts = 2

    def texts_of(self, examples: Sequence[Pair]) -> Texts:
        return [text for pair in examples for text in (pair.chosen, pair.rejected)]

    def targets_of(self, examples: Sequence[Pair]) -> Tensor:
        return torch.tensor([pair.margin for pair in examples])

    def loss(self, normalizer: int) -> Loss:
        return pair_loss(normalizer)

    def held_out(self, scores: Tensor, targets: Tensor) -> Metrics:
        """Loss, accuracy, margin and calibration.

        ``val/calibration_error`` is the expected calibration error (Naeini et al. 2015) of sigmoid(chosen - rejected)
        as the probability that people prefer what they preferred, in ten bins.
        """
        chosen, rejected = scores.unbind(1)
        loss, sums = bradley_terry_loss(chosen, rejected, targets, normalizer=len(targets))
        return {
            "val/loss": float(loss),
            "val/accuracy": float(sums["accuracy"]) / len(targets),
            "val/margin": float((chosen - rejected).mean()),
            "val/calibration_error": calibration_error(torch.sigmoid(chosen - rejected)),
        }


class ScoreTraining(RewardTraining[ScoredText]):
    """Regression, on what people gave scores."""

    num_texts = 1

    def texts_of(self, examples: Sequence[ScoredText]) -> Texts:
        return [text.token_ids for text in examples]

    def targets_of(self, examples: Sequence[ScoredText]) -> Tensor:
        return torch.tensor([text.score for text in examples])

    def loss(self, normalizer: int) -> Loss:
        return score_loss(normalizer)

    def held_out(self, scores: Tensor, targets: Tensor) -> Metrics:
        """Loss, mean absolute error and Pearson's correlation of what the model says with what people say."""
        predicted = scores[:, 0]
        loss, sums = regression_loss(predicted, targets, normalizer=len(targets))
        return {
            "val/loss": float(loss),
            "val/mae": float(sums["mae"]) / len(targets),
            "val/correlation": correlation(predicted, targets),
        }


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
