"""What algorithms that train a single model share: SFT, ILQL, RFT and reward models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from nemo_rlhf.algorithms.base import Algorithm
from nemo_rlhf.algorithms.roles import save_role
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.models.base import MegatronModel, NonFiniteError
from nemo_rlhf.parallel import checkpoint
from nemo_rlhf.parallel.schedule import Loss, Microbatch

Model = TypeVar("Model", bound=MegatronModel)


class OneModel(Algorithm, Generic[Model]):
    """``model`` learns, and the step alone decides from what: a checkpoint holds nothing else of the loop. ``place`` is
    the model's directory in it."""

    model: Model
    place = "policy"

    def learn(
        self, microbatches: Sequence[Microbatch], loss: Loss, batch: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], float]:
        """As ``MegatronModel.learn``; ``batch`` is what to keep for inspection where the result is not finite."""
        try:
            sums, norm = self.model.learn(microbatches, loss)
        except NonFiniteError as error:
            raise self.not_finite(error, batch) from None
        self.gradient_norms.setdefault(self.model.role, []).append(norm)
        return sums, norm

    def architecture(self) -> Architecture:
        return self.model.architecture

    def loop_state(self) -> dict[str, Any]:
        return {}

    def load_loop_state(self, loaded: dict[str, Any]) -> None:
        """There is nothing beside the step."""

    def save_models(self, directory: Path) -> None:
        save_role(self.model, directory / self.place, self.tokenizer, self.tokenizer_dir)
        self.model.save_training_state(directory / "training" / self.place)

    def load_models(self, directory: Path) -> None:
        checkpoint.load_model(self.model.gpt, directory / self.place)
        self.model.load_training_state(directory / "training" / self.place)
