"""ILQL (Snell et al. 2022): scored dialogues -> loss -> update, and a policy that its own Q values guide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.base import Metrics, PhaseTimer
from nemo_rlhf.algorithms.evaluate import Rewards, evaluate, from_prompts
from nemo_rlhf.algorithms.one_model import OneModel
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.algorithms.samples import write_records
from nemo_rlhf.config.sampling import sampling_sweep
from nemo_rlhf.config.schema import ILQLAlgorithmConfig, ILQLConfig
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.batches import pad_dialogues
from nemo_rlhf.data.order import Stream
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.losses.ilql import ilql_loss
from nemo_rlhf.models.ilql import ILQLModel
from nemo_rlhf.ops.returns import discounted_returns
from nemo_rlhf.ops.stats import histograms
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.schedule import Loss, Microbatch
from nemo_rlhf.rollout.collect import make_requests
from nemo_rlhf.rollout.score import RewardFunction
from nemo_rlhf.rollout.sources import CalledSource
from nemo_rlhf.types import Dialogue, Prompt

_VALIDATION_ROWS = 256  # dialogues that are padded together
_NUM_BINS = 40  # of histograms


@dataclass(frozen=True)
class ILQLInputs:
    """What ILQL works on, beside its configuration. Validation samples from the guided policy where there are prompts;
    ``reward_fn`` and ``metric_fn`` then say how good the samples are, and ``logit_mask`` [vocabulary, vocabulary] bool
    which token may follow which."""

    tokenizer: Any
    tokenizer_dir: Path
    dialogues: Sequence[Dialogue]
    validation_dialogues: Sequence[Dialogue] = ()
    validation_prompts: Sequence[Prompt] = ()
    reward_fn: RewardFunction | None = None
    metric_fn: Callable[..., dict[str, Any]] | None = None
    logit_mask: Tensor | None = None


def action_loss(config: ILQLAlgorithmConfig, normalizer: int) -> Loss:
    """The loss of a microbatch's actions; ``normalizer`` as of ``ilql_loss``."""

    def loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = gpt.ilql_scores(hidden, batch.tokens, batch.selected, detach=config.detach_heads)
        return ilql_loss(
            scores.q_taken,
            scores.q_logsumexp,
            scores.target_q_taken,
            scores.values,
            scores.logprobs,
            batch.fields["rewards"],
            batch.fields["is_last"],
            batch.fields["is_cut"],
            tau=config.tau,
            gamma=config.gamma,
            beta=config.beta,
            cql_scale=config.cql_scale,
            awac_scale=config.awac_scale,
            normalizer=normalizer,
            returns=batch.fields.get("returns"),
        )

    return loss


class ILQL(OneModel[ILQLModel]):
    def __init__(self, config: ILQLConfig, inputs: ILQLInputs) -> None:
        has_validation = bool(inputs.validation_dialogues or inputs.validation_prompts)
        interval = config.trainer.val_check_interval if has_validation else 0
        run_dir, size = Path(config.exp_manager.explicit_log_dir), config.model.global_batch_size
        dialogues = Stream(inputs.dialogues, size, config.seed, config.data.shuffle)
        epochs = config.trainer.max_epochs
        max_steps = config.trainer.max_steps if epochs is None else dialogues.num_steps(epochs)
        super().__init__(run_dir, max_steps, interval, inputs.tokenizer, inputs.tokenizer_dir)
        self.config, self.inputs, self.dialogues = config, inputs, dialogues
        _, self.validations = sampling_sweep(config.generation)

    def configure_model(self) -> None:
        config, model = self.config, self.config.model
        self.model = open_role(
            ILQLModel,
            model,
            model.restore_from,
            config.trainer.precision,
            config.seed,
            ilql_num_q=2 if config.ilql.two_qs else 1,
            ilql_head_width=config.ilql.head_width or 2 * read_architecture(model.restore_from).hidden_size,
            ilql_value_trunk=config.ilql.value_trunk,
        )
        self.model.freeze(config.ilql.num_layers_unfrozen)
        self.model.make_trainable(model.optim, self.max_steps)
        if self.inputs.validation_prompts:
            self.engine = Engine(
                self.model.gpt,
                self.tokenizer,
                num_slots=config.generation.num_slots,
                max_sequence_length=self.model.architecture.max_position_embeddings,
                logit_mask=self.inputs.logit_mask,
            )
            for _, values in self.validations:
                self.engine.check(make_requests(self.inputs.validation_prompts, 1, 0), SamplingParams(**values))

    def run_step(self, step: int) -> Metrics:
        ilql, timer = self.config.ilql, PhaseTimer()
        tokens, mask, lengths, fields = self.batch(self.dialogues.batch(step))
        num_actions = int(mask.sum())
        microbatches = self.model.cut(tokens, mask, lengths, range(len(lengths)), fields)
        with timer("update"):
            batch = {"tokens": tokens, "action_mask": mask, "lengths": lengths, **fields}
            sums, norm = self.learn(microbatches, action_loss(ilql, num_actions), batch)
            if (step + 1) % ilql.steps_for_target_q_sync == 0:
                self.model.sync_targets(ilql.alpha)
        if step + 1 == self.max_steps and not self.val_check_interval:
            self.write_values(step + 1)
        assert self.model.learner is not None
        return {
            **self._means(sums, num_actions),
            "grad_norm": norm,
            "lr": self.model.learner.last_lr,
            **timer.metrics,
            "perf/trained_tokens_per_s": int(lengths.sum()) / timer.metrics["time/update_s"],
        }

    def batch(self, dialogues: Sequence[Dialogue]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Tokens, action mask [B, S], lengths [B], and what the loss needs of every action [B, S]."""
        tokens, mask, lengths, rewards = pad_dialogues(dialogues, self.tokenizer.pad_token_id)
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        is_cut = last & ~torch.tensor([dialogue.done for dialogue in dialogues])[:, None]
        fields = {"rewards": rewards, "is_last": last, "is_cut": is_cut}
        if self.config.ilql.target == "mc":
            fields["returns"] = discounted_returns(rewards, mask, self.config.ilql.gamma)
        return tokens, mask, lengths, fields

    def _means(self, sums: dict[str, float], num_actions: int) -> Metrics:
        ilql = self.config.ilql
        means = {name: value / num_actions for name, value in sums.items()}
        scaled = ilql.cql_scale * means["loss/cql"] + ilql.awac_scale * means["loss/awac"]
        return {"loss": means["loss/q"] + means["loss/v"] + scaled, **means}

    def validate(self) -> Metrics:
        """``val/loss`` and its parts on validation dialogues; of samples what ``evaluate`` gives."""
        metrics: Metrics = {}
        self.write_values(self.completed_steps)
        if self.inputs.validation_dialogues:
            metrics |= self._validation_loss()
        if self.inputs.validation_prompts:
            rewards = None if self.inputs.reward_fn is None else Rewards([CalledSource(self.inputs.reward_fn)])
            metrics |= evaluate(
                from_prompts(self.engine, self.inputs.validation_prompts, rewards, self.tokenizer),
                self.validations,
                self.inputs.metric_fn,
                self.tokenizer,
                mode=self.config.exp_manager.checkpoint_callback_params.mode,
                samples_path=self.validation_path(),
            )
        return metrics

    def write_values(self, step: int) -> None:
        """Histograms of Q, target Q and V of the actions of some dialogues, the same ones each time: validation's, or
        training's where it has none. For the report, in ``values/step_N.jsonl``."""
        dialogues = (self.inputs.validation_dialogues or self.inputs.dialogues)[:_VALIDATION_ROWS]
        tokens, mask, lengths, _ = self.batch(dialogues)
        values = self.model.action_values(self.model.cut(tokens, mask, lengths, range(len(lengths))), tokens)
        edges, counts = histograms({name: value[mask] for name, value in values.items()}, _NUM_BINS)
        records = [{"name": name, "edges": edges, "counts": of_bins} for name, of_bins in counts.items()]
        write_records(self.run_dir / "values" / f"step_{step}.jsonl", records)

    def _validation_loss(self) -> Metrics:
        totals: dict[str, float] = {}
        num_actions = 0
        dialogues = self.inputs.validation_dialogues
        for start in range(0, len(dialogues), _VALIDATION_ROWS):
            tokens, mask, lengths, fields = self.batch(dialogues[start : start + _VALIDATION_ROWS])
            microbatches = self.model.cut(tokens, mask, lengths, range(len(lengths)), fields)
            for name, value in self.model.sums(microbatches, action_loss(self.config.ilql, 1)).items():
                totals[name] = totals.get(name, 0.0) + value
            num_actions += int(mask.sum())
        return {f"val/{name}": value for name, value in self._means(totals, num_actions).items()}
