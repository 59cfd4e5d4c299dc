"""PPO (Schulman et al. 2017) on language models: prompts -> rollout -> score -> experience -> update.

After sampling, every rank holds the whole rollout batch on the host, and the models evaluate and learn from shares of
it. So advantages, minibatches and metrics are the same for every TP x PP x DP cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nemo_rlhf.algorithms.base import Algorithm, Metrics, PhaseTimer
from nemo_rlhf.algorithms.episodes import Episodes
from nemo_rlhf.algorithms.evaluate import (
    Rewards,
    evaluate,
    from_prompts,
    sample_and_score,
    source_metrics,
)
from nemo_rlhf.algorithms.model_source import open_model_sources
from nemo_rlhf.algorithms.people import People, PreferenceStore, load_people, open_people
from nemo_rlhf.algorithms.play import Environment
from nemo_rlhf.algorithms.ppo_losses import policy_objective, value_objective
from nemo_rlhf.algorithms.roles import open_critic, open_role, save_role
from nemo_rlhf.algorithms.samples import rollout_records, write_rollouts
from nemo_rlhf.algorithms.update_log import IDLE, UpdateLog
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.sampling import sampling_sweep
from nemo_rlhf.config.schema import PPOConfig
from nemo_rlhf.data.batches import pad_samples
from nemo_rlhf.data.order import Stream
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.base import NonFiniteError, rounding
from nemo_rlhf.models.critic import CriticModel, token_values
from nemo_rlhf.models.policy import PolicyModel, token_logprobs
from nemo_rlhf.models.reference import Reference, ResidentReference, SwappedReference
from nemo_rlhf.ops.kl import next_kl_coef
from nemo_rlhf.ops.scaling import ScoreStatistics
from nemo_rlhf.parallel import checkpoint
from nemo_rlhf.parallel.optimizer import ModelOptimizer
from nemo_rlhf.parallel.schedule import Head, Loss, Microbatch
from nemo_rlhf.rollout.collect import make_requests
from nemo_rlhf.rollout.experience import Evaluation, build_experience, describe_samples
from nemo_rlhf.rollout.sources import CalledSource
from nemo_rlhf.types import Experience, Prompt, Scored

_PER_TOKEN = ("logprobs", "ref_logprobs", "advantages", "values", "returns")
_PERMUTATION_STREAM = 0x9E3779B97F4A7C15  # keeps shuffles apart from the data order of the same seed


@dataclass(frozen=True)
class PPOInputs:
    """What PPO works on, beside its configuration: prompts and sources of rewards, or an environment for each episode's
    number. ``metric_fn`` is called like the reward function and returns numbers, or lists of them, by name.
    ``store`` and ``stopping``: as ``People`` takes them."""

    tokenizer: Any
    tokenizer_dir: Path
    prompts: Sequence[Prompt] = ()
    sources: Sequence[CalledSource] = ()
    env: Callable[[int], Environment] | None = None
    validation_prompts: Sequence[Prompt] = ()
    metric_fn: Callable[..., dict[str, Any]] | None = None
    store: PreferenceStore | None = None
    stopping: Callable[[], bool] = lambda: False


class PPO(Algorithm):
    policy: PolicyModel
    critic: CriticModel | None  # with ppo.advantage=gae only
    reference: Reference
    episodes: Episodes | None  # in the place of prompts and rewards
    people: People | None  # whom a reward model learns from

    def __init__(self, config: PPOConfig, inputs: PPOInputs) -> None:
        has_validation = inputs.validation_prompts or (inputs.env and config.environment.validation_episodes)
        interval = config.trainer.val_check_interval if has_validation else 0
        run_dir = Path(config.exp_manager.explicit_log_dir)
        super().__init__(run_dir, config.trainer.max_steps, interval, inputs.tokenizer, inputs.tokenizer_dir)
        self.config, self.inputs = config, inputs
        if inputs.env is None:
            self.prompts = Stream(inputs.prompts, config.ppo.num_prompts, config.seed, config.data.shuffle)
        rollout_sampling, self.validations = sampling_sweep(config.generation)
        self.sampling = SamplingParams(**rollout_sampling)
        self.critic = None
        self.episodes = None
        self.people = None
        self.kl_coef = config.ppo.kl.coef
        self.statistics = ScoreStatistics()
        self.kl_at_start = float("nan")
        self._graphs: dict[str, Microbatch] = {}  # the first minibatch by role, with ppo.keep_graph

    def configure_model(self) -> None:
        config, model = self.config, self.config.model
        precision, total = config.trainer.precision, config.trainer.max_steps * self._updates_per_step()

        def open_policy() -> PolicyModel:
            return open_role(PolicyModel, model, model.restore_from, precision, config.seed)

        self.policy = open_policy()
        self.policy.make_trainable(model.optim, total)
        if config.ppo.advantage == "gae":
            self.critic = open_critic(model, self.policy.architecture.vocab_size, precision, config.seed)
            self.critic.make_trainable(model.critic.optim, total)
        if config.ppo.reference == "swap":
            self.reference = SwappedReference(self.policy)
        else:
            self.reference = ResidentReference(self.policy, open_policy, "reference" in config.ppo.offload)
        models = open_model_sources(config)
        self.rewards = Rewards(self.inputs.sources, models)
        self.people = open_people(config, models, self.inputs)
        longest = self.policy.architecture.max_position_embeddings
        if self.inputs.env is not None:
            longest = min(longest, config.environment.max_sequence_length)
        num_slots = config.generation.num_slots
        self.engine = Engine(self.policy.gpt, self.tokenizer, num_slots=num_slots, max_sequence_length=longest)
        if self.inputs.env is not None:
            size = config.ppo.samples_per_prompt
            self.episodes = Episodes(self.engine, self.tokenizer, self.inputs.env, config.environment, size, longest)
        self.engine.check(make_requests(self.inputs.prompts, 1, 0), self.sampling)
        for _, values in self.validations:
            self.engine.check(make_requests(self.inputs.validation_prompts, 1, 0), SamplingParams(**values))

    def on_fit_start(self) -> None:
        if self.critic is not None and "critic" in self.config.ppo.offload:
            self.critic.weights_out()
        if "optimizer" in self.config.ppo.offload:
            for learner in self._learners():
                learner.offload()

    # ---- one step, arrow by arrow

    def run_step(self, step: int) -> Metrics:
        timer = PhaseTimer()
        heard: Metrics = {}
        if self.people is not None:
            with timer("feedback"):
                heard = self.people.before(step, self.engine, self.sampling)
        with timer("rollout"):
            scored, score_s = self.collect(step)
        timer.metrics["time/rollout_s"] -= score_s
        timer.metrics["time/score_s"] = score_s
        with timer("experience"):
            experience, metrics = self.experience(scored)
        metrics |= source_metrics(scored)
        with timer("update"):
            metrics |= self.update(experience, step)
        kl = self.config.ppo.kl
        self.kl_coef = next_kl_coef(
            self.kl_coef, metrics["kl/sequence"], kl.target, kl.horizon, len(experience.lengths)
        )
        metrics |= timer.metrics | heard
        responses = int(experience.response_mask.sum())
        metrics["perf/generated_tokens_per_s"] = responses / metrics["time/rollout_s"]
        metrics["perf/trained_tokens_per_s"] = (
            int(experience.lengths.sum()) * metrics["epochs"] / metrics["time/update_s"]
        )
        figures = describe_samples(experience, self.config.ppo.kl.estimator)
        write_rollouts(self.run_dir, step + 1, rollout_records(scored, figures), self.config.ppo.keep_rollouts)
        return metrics

    def collect(self, step: int) -> tuple[Scored, float]:
        """Sample and score this step's prompts, or play its episodes; the whole batch, on every rank, and the seconds
        that scoring took."""
        ppo = self.config.ppo
        first = step * ppo.num_prompts * ppo.samples_per_prompt
        if self.episodes is not None:
            return self.episodes.play(first, ppo.num_prompts * ppo.samples_per_prompt, self.sampling), 0.0
        requests = make_requests(self.prompts.batch(step), ppo.samples_per_prompt, first)
        return sample_and_score(self.engine, requests, self.sampling, self.rewards, self.tokenizer)

    def experience(self, scored: Scored) -> tuple[Experience, Metrics]:
        batch = pad_samples(scored.rollout.samples, self.tokenizer.pad_token_id)
        evaluation = self.evaluate_tokens(*batch)
        if self.completed_steps == 0:
            difference = (evaluation.logprobs - evaluation.ref_logprobs).abs().max()
            self.kl_at_start = float(difference)
            if self.kl_at_start > rounding(self.config.trainer.precision):
                warnings.warn(
                    f"policy and reference differ by {self.kl_at_start:.1e} in log-probability before any update.",
                    stacklevel=2,
                )
        experience, self.statistics, metrics = build_experience(
            scored, batch, evaluation, self.config.ppo, self.kl_coef, self.statistics
        )
        return experience, {**metrics, "check/kl_step0": self.kl_at_start}

    def evaluate_tokens(self, tokens: Tensor, mask: Tensor, lengths: Tensor) -> Evaluation:
        """Every model's view of the sampled tokens, in the very microbatches that the first epoch learns from."""
        microbatches = [
            m for rows in self.minibatches(len(lengths)) for m in self.policy.cut(tokens, mask, lengths, rows)
        ]
        temperature = self.sampling.temperature
        ref_logprobs = self.reference.logprobs(microbatches, temperature, tokens)
        with self._critic_on_device():
            values = None
            if self.critic is not None:
                values = self.critic.values(self._kept(self.critic, microbatches, token_values), tokens)
        if self.completed_steps >= self.config.ppo.critic_warmup_steps:  # otherwise the policy does not learn
            head = partial(token_logprobs, temperature=temperature)
            microbatches = self._kept(self.policy, microbatches, head)
        logprobs, entropy = self.policy.logprobs(microbatches, temperature, tokens)
        return Evaluation(logprobs=logprobs, ref_logprobs=ref_logprobs, entropy=entropy, values=values)

    def _kept(self, model: PolicyModel | CriticModel, microbatches: list[Microbatch], head: Head) -> list[Microbatch]:
        if not self.config.ppo.keep_graph:
            return microbatches
        first = self._graphs[model.role] = model.with_graph(microbatches[0], head)
        return [first, *microbatches[1:]]

    def update(self, experience: Experience, step: int) -> Metrics:
        """The inner epochs: critic and policy learn from minibatches of the whole batch."""
        ppo = self.config.ppo
        log = UpdateLog(self._idle())
        with self._critic_on_device(), self._optimizers_on_device():
            for epoch in range(ppo.epochs):
                for rows in self.minibatches(len(experience.lengths), step, epoch):
                    tokens = int(experience.loss_mask[rows].sum())
                    if self.critic is not None:
                        self._learn(self.critic, experience, rows, tokens, value_objective(ppo, tokens), log)
                    if step >= ppo.critic_warmup_steps:
                        objective = policy_objective(ppo, self.sampling.temperature, self.kl_coef, tokens)
                        self._learn(self.policy, experience, rows, tokens, objective, log)
                log.end_epoch()
                if ppo.target_kl is not None and log.last_kl > ppo.target_kl:
                    break
        metrics = log.metrics()
        for model in self._models():
            assert model.learner is not None
            metrics[f"lr/{model.role}"] = model.learner.last_lr
        if abs(metrics["check/ratio_step0"] - 1.0) > rounding(self.config.trainer.precision) and step == 0:
            warnings.warn(
                f"ratios before the first update go up to {metrics['check/ratio_step0']:.6f} and should be 1: "
                f"log-probabilities of sampling and training differ.",
                stacklevel=2,
            )
        return metrics

    # ---- parts of a step

    def minibatches(self, num_samples: int, step: int = 0, epoch: int = 0) -> Iterator[list[int]]:
        """Rows of each minibatch: in order in the first epoch, shuffled by (seed, step, epoch) in the others."""
        rows = np.arange(num_samples)
        if epoch:
            key = np.array([(self.config.seed + _PERMUTATION_STREAM) % 2**64, step * 2**20 + epoch], dtype=np.uint64)
            rows = np.random.Generator(np.random.Philox(key=key)).permutation(num_samples)
        size = self.config.ppo.minibatch_size
        return (rows[start : start + size].tolist() for start in range(0, num_samples, size))

    def _updates_per_step(self) -> int:
        ppo = self.config.ppo
        return ppo.epochs * (ppo.num_prompts * ppo.samples_per_prompt // ppo.minibatch_size)

    def _idle(self) -> dict[str, Metrics]:
        idle: dict[str, Metrics] = {model.role: IDLE[model.role] for model in self._models()}
        if self.config.ppo.advantage == "grpo":
            idle["policy"] = {**idle["policy"], "loss/kl": 0.0}
        return idle

    def _learn(
        self,
        model: PolicyModel | CriticModel,
        experience: Experience,
        rows: list[int],
        tokens: int,
        loss: Loss,
        log: UpdateLog,
    ) -> None:
        """One optimizer step on the ``tokens`` of a minibatch; where there are none, only one of the schedule."""
        assert model.learner is not None
        evaluated = self._graphs.pop(model.role, None)
        if tokens == 0:
            model.learner.scheduler.step(1)
            return
        batch = {name: value for name, value in vars(experience).items() if value is not None}
        fields = {name: batch[name] for name in _PER_TOKEN if name in batch}
        microbatches = model.cut(experience.tokens, experience.loss_mask, experience.lengths, rows, fields)
        if evaluated is not None:
            (microbatch,) = microbatches
            microbatches = [replace(microbatch, hidden=evaluated.hidden, said=evaluated.said)]
        try:
            sums, norm = model.learn(microbatches, loss)
        except NonFiniteError as error:
            kept = {name: value[rows] for name, value in batch.items()}
            raise self.not_finite(error, {**kept, "role": model.role}) from None
        log.add(model.role, sums, norm, tokens)
        self.gradient_norms.setdefault(model.role, []).append(norm)

    @contextmanager
    def _critic_on_device(self) -> Iterator[None]:
        away = self.critic if self.critic is not None and self.critic.weights_are_out else None
        if away is not None:
            away.weights_back()
        try:
            yield
        finally:
            if away is not None:
                away.weights_out()

    @contextmanager
    def _optimizers_on_device(self) -> Iterator[None]:
        away = [learner for learner in self._learners() if learner.is_offloaded]
        for learner in away:
            learner.restore()
        try:
            yield
        finally:
            for learner in away:
                learner.offload()

    def _learners(self) -> list[ModelOptimizer]:
        return [learner for model in self._models() if (learner := model.learner) is not None]

    def _models(self) -> list[PolicyModel | CriticModel]:
        """Those that learn."""
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    # ---- what Algorithm asks for

    def validate(self) -> Metrics:
        prompts = self.inputs.validation_prompts
        by_prompt = from_prompts(self.engine, prompts, self.rewards, self.tokenizer)
        return evaluate(
            by_prompt if self.episodes is None else self.episodes.validation,
            self.validations,
            self.inputs.metric_fn,
            self.tokenizer,
            mode=self.config.exp_manager.checkpoint_callback_params.mode,
            samples_path=self.validation_path(),
        )

    def architecture(self) -> Architecture:
        return self.policy.architecture

    def loop_state(self) -> dict[str, Any]:
        return {
            "kl_coef": self.kl_coef,
            "statistics": self.statistics.to_dict(),
            "kl_at_start": self.kl_at_start,
            **({} if self.people is None else {"people": self.people.loop_state()}),
        }

    def load_loop_state(self, loaded: dict[str, Any]) -> None:
        self.kl_coef, self.kl_at_start = loaded["kl_coef"], loaded["kl_at_start"]
        self.statistics = ScoreStatistics.from_dict(loaded["statistics"])
        if self.people is not None and "people" in loaded:
            self.people.load_loop_state(loaded["people"])

    def save_models(self, directory: Path) -> None:
        with self._critic_on_device(), self._optimizers_on_device():
            for model in self._models():
                save_role(model, directory / model.role, self.tokenizer, self.tokenizer_dir)
                model.save_training_state(directory / "training" / model.role)
        if self.people is not None:
            self.people.learner.save(directory)

    def load_models(self, directory: Path) -> None:
        has_critic = (directory / CriticModel.role).is_dir()
        if has_critic != (self.critic is not None):
            words = "a critic, for which there is no use" if has_critic else "no critic, which is needed"
            raise ValueError(
                f"the checkpoint {directory} has {words} with ppo.advantage={self.config.ppo.advantage}: continue with "
                "the ppo.advantage that the run was started with, or use another exp_manager.explicit_log_dir."
            )
        load_people(self.people, directory)
        with self._critic_on_device(), self._optimizers_on_device():
            for model in self._models():
                checkpoint.load_model(model.gpt, directory / model.role)
                model.load_training_state(directory / "training" / model.role)
