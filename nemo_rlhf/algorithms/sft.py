"""Supervised fine-tuning: texts -> loss -> update, and what a policy starts from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.base import Metrics, PhaseTimer
from nemo_rlhf.algorithms.one_model import OneModel
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.config.schema import SFTConfig
from nemo_rlhf.data.batches import pad_texts
from nemo_rlhf.data.order import Stream
from nemo_rlhf.losses.sft import sft_loss
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Loss, Microbatch
from nemo_rlhf.types import Text

_VALIDATION_ROWS = 256  # texts that are padded together


def token_loss(normalizer: int) -> Loss:
    """The loss of a microbatch's selected tokens; ``normalizer`` as of ``sft_loss``."""

    def loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, _ = gpt.vocab_logprobs(hidden, batch.tokens, batch.selected)
        return sft_loss(logprobs, torch.ones_like(batch.selected, dtype=torch.bool), normalizer=normalizer)

    return loss


class SFT(OneModel[PolicyModel]):
    def __init__(
        self,
        config: SFTConfig,
        tokenizer: Any,
        tokenizer_dir: Path,
        texts: Sequence[Text],
        validation_texts: Sequence[Text] = (),
    ) -> None:
        interval = config.trainer.val_check_interval if validation_texts else 0
        run_dir, epochs = Path(config.exp_manager.explicit_log_dir), config.trainer.max_epochs
        stream = Stream(texts, config.model.global_batch_size, config.seed, config.data.shuffle)
        max_steps = config.trainer.max_steps if epochs is None else stream.num_steps(epochs)
        super().__init__(run_dir, max_steps, interval, tokenizer, tokenizer_dir)
        self.config, self.texts, self.validation_texts = config, stream, validation_texts

    def configure_model(self) -> None:
        model = self.config.model
        self.model = open_role(PolicyModel, model, model.restore_from, self.config.trainer.precision, self.config.seed)
        self.model.make_trainable(model.optim, self.max_steps)

    def run_step(self, step: int) -> Metrics:
        timer = PhaseTimer()
        tokens, mask, lengths = self._batch(self.texts.batch(step))
        num_learned = int(mask.sum())
        microbatches = self._microbatches(tokens, mask, lengths)
        with timer("update"):
            batch = {"tokens": tokens, "loss_mask": mask, "lengths": lengths}
            sums, norm = self.learn(microbatches, token_loss(num_learned), batch)
        assert self.model.learner is not None
        loss = sums["loss"] / num_learned
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 50.0)),
            "grad_norm": norm,
            "lr": self.model.learner.last_lr,
            **timer.metrics,
            "perf/trained_tokens_per_s": int(lengths.sum()) / timer.metrics["time/update_s"],
        }

    def validate(self) -> Metrics:
        """``val/loss``: mean over all learned tokens of the validation texts."""
        total, learned = 0.0, 0
        for start in range(0, len(self.validation_texts), _VALIDATION_ROWS):
            tokens, mask, lengths = self._batch(self.validation_texts[start : start + _VALIDATION_ROWS])
            microbatches = self._microbatches(tokens, mask, lengths)
            logprobs, _ = self.model.logprobs(microbatches, 1.0, tokens)
            total -= float(logprobs[mask].double().sum())
            learned += int(mask.sum())
        return {"val/loss": total / learned, "val/perplexity": math.exp(min(total / learned, 50.0))}

    def _batch(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor, Tensor]:
        return pad_texts(texts, self.tokenizer.pad_token_id)

    def _microbatches(self, tokens: Tensor, mask: Tensor, lengths: Tensor) -> list[Microbatch]:
        rows, data = range(len(lengths)), self.config.data
        if not data.packing:
            return self.model.cut(tokens, mask, lengths, rows)
        max_tokens = data.max_sequence_length * self.config.model.micro_batch_size
        return self.model.pack(tokens, mask, lengths, rows, max_tokens)
