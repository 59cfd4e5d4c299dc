"""The reward model in a PPO job as something that learns: what people said -> loss -> update, or back again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_rlhf.algorithms.model_source import ModelSource
from nemo_rlhf.algorithms.reward import pair_loss
from nemo_rlhf.algorithms.roles import save_role
from nemo_rlhf.algorithms.scorer import score_texts
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.batches import pad_for_scores
from nemo_rlhf.losses.reward import bradley_terry_loss
from nemo_rlhf.ops.masks import moments
from nemo_rlhf.ops.stats import mean_and_std
from nemo_rlhf.parallel import checkpoint
from nemo_rlhf.parallel.offload import Backup
from nemo_rlhf.types import Pair


@dataclass(frozen=True)
class Judged:
    """What a reward model says of pairs. NaN where there are none."""

    accuracy: float
    loss: float

    def is_better_than(self, other: Judged) -> bool:
        """By accuracy; where that is the same, by the Bradley-Terry loss."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


class RewardLearner:
    """Each refresh starts the optimizer anew, so a reward model is its weights before and the pairs that it saw."""

    role = "reward"  # its directory in a checkpoint

    def __init__(self, source: ModelSource) -> None:
        """``source`` was opened to be trained."""
        self.source, self.scorer = source, source.scorer
        assert self.scorer.model.learner is not None
        self.learner = self.scorer.model.learner

    def encode(self, prompt: str, chosen: str, rejected: str, where: str, margin: float = 0.0) -> Pair:
        """Raises ValueError, which begins with ``where``, for a text that the model cannot hold."""
        return Pair(self.scorer.encode(prompt, chosen, where), self.scorer.encode(prompt, rejected, where), margin)

    def judge(self, pairs: Sequence[Pair]) -> Judged:
        """All ranks call it with the same pairs; all get the same."""
        if not pairs:
            return Judged(float("nan"), float("nan"))
        with self.source.on_device():
            scores = score_texts(self.scorer.model, _texts(pairs), self.scorer.tokenizer.pad_token_id)
        chosen, rejected = scores.view(-1, 2).unbind(1)
        loss, sums = bradley_terry_loss(chosen, rejected, _margins(pairs), normalizer=len(pairs))
        return Judged(float(sums["accuracy"]) / len(pairs), float(loss))

    def refresh(self, batches: Sequence[Sequence[Pair]], held_out: Sequence[Pair]) -> tuple[Judged, Judged, bool]:
        """One optimizer step a batch. What the model said of ``held_out`` before and after, and whether the new weights
        stay: only if they are better at that.

        Raises:
            NonFiniteError: on every rank; the weights are those of before.
        """
        before = self.judge(held_out)
        with self.source.learning():
            backup = Backup(self.learner.weights())
            self.learner.start_anew()
            try:
                for batch in batches:
                    self._learn(batch)
                after = self.judge(held_out)
                accepted = after.is_better_than(before)
            except BaseException:
                accepted = False
                raise
            finally:
                if not accepted:
                    backup.restore()
                self.learner.start_anew()
        return before, after, accepted

    def measure_scale(self, pairs: Sequence[Pair]) -> None:
        """Mean and deviation of the scores of these texts, which are stored with the weights and, where the source is
        normalised, taken off its scores."""
        with self.source.on_device():
            scores = score_texts(self.scorer.model, _texts(pairs), self.scorer.tokenizer.pad_token_id)
        self.scorer.set_scale(*mean_and_std(moments(scores)))

    def save(self, directory: Path) -> None:
        """Into the directory of a checkpoint; all ranks call it."""
        with self.source.on_device():
            save_role(self.scorer.model, directory / self.role, self.scorer.tokenizer, self.scorer.tokenizer_dir)

    def load(self, directory: Path) -> None:
        with self.source.on_device():
            checkpoint.load_model(self.scorer.model.gpt, directory / self.role)
        stored = read_architecture(directory / self.role)
        self.scorer.set_scale(stored.score_mean, stored.score_std)

    def _learn(self, pairs: Sequence[Pair]) -> None:
        tokens, mask, lengths = pad_for_scores(_texts(pairs), self.scorer.tokenizer.pad_token_id)
        margins = _margins(pairs).repeat_interleave(2)[:, None].expand(tokens.shape)
        rows = range(0, len(lengths), 2)
        microbatches = self.scorer.model.cut(tokens, mask, lengths, rows, {"targets": margins}, together=2)
        self.scorer.model.learn(microbatches, pair_loss(len(pairs)))


def _texts(pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
    return [text for pair in pairs for text in (pair.chosen, pair.rejected)]


def _margins(pairs: Sequence[Pair]) -> torch.Tensor:
    """[pairs] fp32."""
    return torch.tensor([pair.margin for pair in pairs])
