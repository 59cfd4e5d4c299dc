"""A reward model in use: whole texts in, scores out, the same for validation, for a server and for a PPO job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.roles import open_role, open_tokenizer
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.batches import pad_for_scores
from nemo_rlhf.data.scores import encode_reply
from nemo_rlhf.models.reward import RewardModel

_TOGETHER = 128  # texts that are padded to one length
UNMEASURED = (0.0, 1.0)


def score_texts(model: RewardModel, texts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Scores [texts] fp32 of tokenised texts, at their last tokens; all ranks call it, and all have the result."""
    parts = [torch.zeros(0)]
    for start in range(0, len(texts), _TOGETHER):
        tokens, mask, lengths = pad_for_scores(texts[start : start + _TOGETHER], pad_id)
        microbatches = model.cut(tokens, mask, lengths, range(len(lengths)))
        parts.append(model.scores(microbatches, tokens)[mask])
    return torch.cat(parts)


class Scorer:
    """A trained reward model with its own tokenizer."""

    tokenizer: Any
    tokenizer_dir: Path
    model: RewardModel

    def __init__(self, config: ModelConfig, precision: str, *, normalise: bool) -> None:
        """All ranks call it. ``normalise``: scores minus the mean of those on held-out data, divided by their standard
        deviation, as training stored them.

        Raises:
            ValueError: there is no reward model in ``config.restore_from``, it does not fit the cut, or it does not
                know its scores' mean and deviation.
        """
        source = config.restore_from
        stored = read_architecture(source)
        if "value" not in stored.heads:
            raise ValueError(
                f"{source} has no head that gives scores: train a reward model from it with nemo-rlhf reward."
            )
        self._source, self._longest = source, stored.max_position_embeddings
        self._normalise = normalise
        if normalise and ((stored.score_mean, stored.score_std) == UNMEASURED or stored.score_std <= 0):
            raise ValueError(
                f"normalise=true needs the mean and deviation of scores on held-out data, and {source} has none: train "
                "it with data.validation and trainer.val_check_interval, or set normalise=false."
            )
        self.tokenizer, self.tokenizer_dir = open_tokenizer(config)
        self.model = open_role(RewardModel, config, source, precision, 0)

    def encode(self, prompt: str, response: str, where: str) -> tuple[int, ...]:
        """The tokens that are scored. Raises ValueError, which begins with ``where``, where the model holds fewer."""
        token_ids = encode_reply(prompt, response, self.tokenizer)
        if len(token_ids) > self._longest:
            raise ValueError(
                f"{where} has {len(token_ids)} tokens of prompt and response, and the reward model in {self._source} "
                f"takes {self._longest} at most."
            )
        return token_ids

    def set_scale(self, mean: float, std: float) -> None:
        """What the scores of these weights are like, from now on; it is stored with them."""
        architecture = replace(self.model.architecture, score_mean=mean, score_std=std)
        self.model.architecture = self.model.gpt.architecture = architecture

    def scores(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """[texts] fp32, on every rank; all ranks call it with the same tokenised texts."""
        scores = score_texts(self.model, texts, self.tokenizer.pad_token_id)
        scale = self.model.architecture
        return (scores - scale.score_mean) / scale.score_std if self._normalise else scores
