"""RFT, fine-tuning on the best of a policy's own samples (as in Dong et al. 2023, "RAFT", and trlX's RFT).

prompts -> rollout -> score -> the best of each prompt -> loss -> update. A step is a round: many responses to each
prompt, and several passes over those that pass a percentile of their prompt's rewards, which rises from pass to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nemo_rlhf.algorithms.base import Metrics, PhaseTimer
from nemo_rlhf.algorithms.evaluate import Rewards, evaluate, from_prompts, sample_and_score, source_metrics
from nemo_rlhf.algorithms.model_source import open_model_sources
from nemo_rlhf.algorithms.one_model import OneModel
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.algorithms.samples import rollout_records, total_scores, write_rollouts
from nemo_rlhf.algorithms.sft import token_loss
from nemo_rlhf.config.sampling import sampling_sweep
from nemo_rlhf.config.schema import RFTAlgorithmConfig, RFTConfig
from nemo_rlhf.data.batches import pad_samples
from nemo_rlhf.data.order import WORD, Stream
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.rollout.collect import make_requests
from nemo_rlhf.rollout.sources import CalledSource
from nemo_rlhf.types import Prompt, Sample, Scored

_PERMUTATION_STREAM = 0xD1B54A32D192ED03  # keeps shuffles apart from the data order of the same seed


@dataclass(frozen=True)
class RFTInputs:
    """What RFT works on, beside its configuration; as ``PPOInputs``."""

    tokenizer: Any
    tokenizer_dir: Path
    prompts: Sequence[Prompt]
    sources: Sequence[CalledSource]
    validation_prompts: Sequence[Prompt] = ()
    metric_fn: Callable[..., dict[str, Any]] | None = None


def percentiles(config: RFTAlgorithmConfig) -> list[float]:
    """That of each pass, evenly from the first to the last; a single pass has the last."""
    if config.improve_steps == 1:
        return [config.end_percentile]
    return np.linspace(config.start_percentile, config.end_percentile, config.improve_steps).tolist()


def best_rows(samples: Sequence[Sample], totals: Tensor, samples_per_prompt: int, percentile: float) -> list[int]:
    """Which samples to learn from: those whose reward is at or above the percentile of their prompt's rewards, and
    above the lowest of the whole round (where rewards take few values, a prompt's percentile may be that). The same
    response to the same prompt counts once.

    Args:
        samples: ``samples_per_prompt`` of each prompt, side by side.
        totals: [samples], their rewards.
    """
    by_prompt = totals.double().view(-1, samples_per_prompt)
    thresholds = by_prompt.quantile(percentile, dim=1, keepdim=True, interpolation="lower")
    kept = ((by_prompt >= thresholds) & (by_prompt > by_prompt.min())).view(-1).tolist()
    distinct: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for row, sample in enumerate(samples):
        if kept[row]:
            distinct.setdefault((sample.prompt.token_ids, sample.response_ids), row)
    return list(distinct.values())


class RFT(OneModel[PolicyModel]):
    def __init__(self, config: RFTConfig, inputs: RFTInputs) -> None:
        interval = config.trainer.val_check_interval if inputs.validation_prompts else 0
        run_dir = Path(config.exp_manager.explicit_log_dir)
        super().__init__(run_dir, config.trainer.max_steps, interval, inputs.tokenizer, inputs.tokenizer_dir)
        self.config, self.inputs = config, inputs
        self.prompts = Stream(inputs.prompts, config.rft.num_prompts, config.seed, config.data.shuffle)
        rollout_sampling, self.validations = sampling_sweep(config.generation)
        self.sampling = SamplingParams(**rollout_sampling)

    def configure_model(self) -> None:
        config, model, rft = self.config, self.config.model, self.config.rft
        self.model = open_role(PolicyModel, model, model.restore_from, config.trainer.precision, config.seed)
        # how many samples are kept is not known beforehand: schedules count as if all were
        self.updates_per_pass = -(-rft.num_prompts * rft.samples_per_prompt // model.global_batch_size)
        self.model.make_trainable(model.optim, self.max_steps * rft.improve_steps * self.updates_per_pass)
        self.rewards = Rewards(self.inputs.sources, open_model_sources(config))
        self.engine = Engine(
            self.model.gpt,
            self.tokenizer,
            num_slots=config.generation.num_slots,
            max_sequence_length=self.model.architecture.max_position_embeddings,
        )
        self.engine.check(make_requests(self.inputs.prompts, 1, 0), self.sampling)
        for _, values in self.validations:
            self.engine.check(make_requests(self.inputs.validation_prompts, 1, 0), SamplingParams(**values))

    def run_step(self, step: int) -> Metrics:
        timer, rft = PhaseTimer(), self.config.rft
        with timer("rollout"):
            first = step * rft.num_prompts * rft.samples_per_prompt
            requests = make_requests(self.prompts.batch(step), rft.samples_per_prompt, first)
            scored, score_s = sample_and_score(self.engine, requests, self.sampling, self.rewards, self.tokenizer)
        timer.metrics["time/rollout_s"] -= score_s
        timer.metrics["time/score_s"] = score_s
        with timer("update"):
            updated = self.update(scored, step)
        write_rollouts(self.run_dir, step + 1, rollout_records(scored), rft.keep_rollouts)
        trained_tokens = updated.pop("trained_tokens")
        responses = sum(len(sample.response_ids) for sample in scored.rollout.samples)
        return {
            **_describe(scored),
            **source_metrics(scored),
            **updated,
            **timer.metrics,
            "perf/generated_tokens_per_s": responses / timer.metrics["time/rollout_s"],
            "perf/trained_tokens_per_s": trained_tokens / timer.metrics["time/update_s"],
        }

    def update(self, scored: Scored, step: int) -> Metrics:
        """The passes: each learns from the samples that its percentile leaves, in batches of like size."""
        rft, samples, totals = self.config.rft, scored.rollout.samples, total_scores(scored)
        tokens, mask, lengths = pad_samples(samples, self.tokenizer.pad_token_id)
        assert self.model.learner is not None
        scheduler = self.model.learner.scheduler
        loss = norms = 0.0
        num_learned = num_updates = trained_tokens = 0
        kept = []
        for number, percentile in enumerate(percentiles(rft)):
            rows = best_rows(samples, totals, rft.samples_per_prompt, percentile)
            kept.append(len(rows) / len(samples))
            batches = self.batches(rows, step, number)
            for batch in batches:
                num_tokens = int(mask[batch].sum())
                total, norm = self._learn((tokens, mask, lengths), batch, num_tokens)
                loss, norms = loss + total, norms + norm
                num_learned, num_updates = num_learned + num_tokens, num_updates + 1
                trained_tokens += int(lengths[batch].sum())
            scheduler.step(self.updates_per_pass - len(batches))
        return {
            "loss": loss / max(1, num_learned),
            "grad_norm": norms / max(1, num_updates),
            "lr": self.model.learner.last_lr,
            "rft/kept_first": kept[0],
            "rft/kept_last": kept[-1],
            "rft/updates": num_updates,
            "trained_tokens": trained_tokens,
        }

    def batches(self, rows: Sequence[int], step: int, number: int) -> list[list[int]]:
        """``rows``, shuffled by (seed, step, pass), in as few batches as ``model.global_batch_size`` allows."""
        key = np.array([(self.config.seed + _PERMUTATION_STREAM) % WORD, step * 2**20 + number], dtype=np.uint64)
        shuffled = np.random.Generator(np.random.Philox(key=key)).permutation(rows)
        parts = -(-len(rows) // self.config.model.global_batch_size)
        return [part.tolist() for part in np.array_split(shuffled, parts)] if parts else []

    def _learn(self, whole: tuple[Tensor, Tensor, Tensor], rows: list[int], num_tokens: int) -> tuple[float, float]:
        names = ("tokens", "response_mask", "lengths")
        batch = {name: part[rows] for name, part in zip(names, whole, strict=True)}
        sums, norm = self.learn(self.model.cut(*whole, rows), token_loss(num_tokens), batch)
        return sums["loss"], norm

    def validate(self) -> Metrics:
        return evaluate(
            from_prompts(self.engine, self.inputs.validation_prompts, self.rewards, self.tokenizer),
            self.validations,
            self.inputs.metric_fn,
            self.tokenizer,
            mode=self.config.exp_manager.checkpoint_callback_params.mode,
            samples_path=self.validation_path(),
        )


def _describe(scored: Scored) -> Metrics:
    totals, samples = total_scores(scored), scored.rollout.samples
    return {
        "reward/mean": float(totals.mean()),
        "reward/std": float(totals.std(unbiased=False)),
        "response_length/mean": sum(len(sample.response_ids) for sample in samples) / len(samples),
        "eos/share": sum(sample.finish_reason.startswith("eos") for sample in samples) / len(samples),
    }
