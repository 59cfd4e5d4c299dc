"""Rewards from a reward model in the same job, which all ranks run together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

from torch import Tensor

from nemo_rlhf.algorithms.scorer import Scorer
from nemo_rlhf.config.people import FeedbackConfig
from nemo_rlhf.config.schema import ModelConfig, PPOConfig, RFTConfig
from nemo_rlhf.config.sources import ModelSourceConfig, read_sources
from nemo_rlhf.config.validate_people import learning_source
from nemo_rlhf.types import Sample


class ModelSource:
    """A reward model beside the policy, cut as the policy is; between its uses it may wait in host memory.

    It sees prompt and response as text, which its own tokenizer reads as it did in training: so its scores are those
    of the same model behind HTTP, and the policy may have another vocabulary.
    """

    def __init__(
        self, source: ModelSourceConfig, model: ModelConfig, precision: str, people: FeedbackConfig | None = None
    ) -> None:
        """``model``: the policy's; ``people``: whom it is to learn from. All ranks call it. Raises ValueError as
        ``Scorer``."""
        self.name, self.weight = source.name, source.weight
        config = replace(
            model,
            restore_from=source.restore_from,
            init="pretrained",
            tokenizer=None,
            micro_batch_size=source.micro_batch_size or model.micro_batch_size,
        )
        self.scorer = Scorer(config, precision, normalise=source.normalise)
        self._swaps = source.residence == "swap"
        if people is not None:
            self.scorer.model.make_trainable(people.optim, people.refresh_steps)
        if self._swaps:
            self._out()

    def scores(self, samples: Sequence[Sample]) -> Tensor:
        """Unweighted scores [samples] fp32 on the host. All ranks call it with the same samples; all get all scores.

        Raises:
            ValueError: a sample is longer than the model can hold, or its score is not finite.
        """
        title = f'The reward model "{self.name}"'
        texts = [
            self.scorer.encode(sample.prompt.text, sample.text, f"{title}: sample {index}")
            for index, sample in enumerate(samples)
        ]
        with self.on_device():
            scores = self.scorer.scores(texts)
        if not scores.isfinite().all():
            index = int(scores.isfinite().logical_not().nonzero()[0])
            raise ValueError(f"{title}: the score of sample {index} is {scores[index]:g}, and must be finite.")
        return scores

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the weights are in use; it may be entered again."""
        model = self.scorer.model
        away = model.weights_are_out
        if away:
            model.weights_back()
        try:
            yield
        finally:
            if away:
                model.weights_out()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, so are gradients and optimizer."""
        learner = self.scorer.model.learner
        assert learner is not None
        with self.on_device():
            if learner.is_offloaded:
                learner.restore()
            try:
                yield
            finally:
                if self._swaps:
                    learner.offload()

    def _out(self) -> None:
        if self.scorer.model.learner is not None:
            self.scorer.model.learner.offload()
        self.scorer.model.weights_out()


def open_model_sources(config: PPOConfig | RFTConfig) -> list[ModelSource]:
    """The reward models among ``reward.sources``, in their order; all ranks call it.

    Raises:
        ValueError: one of them is no reward model, or cannot be cut as the policy is.
    """
    model = ModelConfig(**{field.name: getattr(config.model, field.name) for field in fields(ModelConfig)})
    people = learns = None
    if isinstance(config, PPOConfig) and config.ppo.feedback.store is not None:
        people, learns = config.ppo.feedback, learning_source(config)
    return [
        ModelSource(source, model, config.trainer.precision, people if source.name == learns else None)
        for source in read_sources(config.reward.sources)
        if isinstance(source, ModelSourceConfig)
    ]
