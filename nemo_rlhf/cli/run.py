"""From a configuration to a finished run: data, algorithm, Lightning's trainer, NeMo's exp_manager, exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_rlhf import device
from nemo_rlhf.algorithms.base import Algorithm, Metrics, stored_metrics
from nemo_rlhf.algorithms.evaluate import sample
from nemo_rlhf.algorithms.ilql import ILQL, ILQLInputs
from nemo_rlhf.algorithms.play import Environment, play
from nemo_rlhf.algorithms.ppo import PPO, PPOInputs
from nemo_rlhf.algorithms.reward import PairTraining, ScoreTraining
from nemo_rlhf.algorithms.rft import RFT, RFTInputs
from nemo_rlhf.algorithms.roles import open_role, open_tokenizer
from nemo_rlhf.algorithms.sft import SFT
from nemo_rlhf.cli import stop
from nemo_rlhf.cli.callbacks import (
    Checkpoints,
    Progress,
    StopSignals,
    newest_whole_checkpoint,
    remove_unfinished,
    stored_checkpoints,
)
from nemo_rlhf.cli.loggers import JsonlLogger
from nemo_rlhf.cli.people import open_store
from nemo_rlhf.cli.rank import begin, end, kernels
from nemo_rlhf.cli.report import write_report
from nemo_rlhf.config import dump
from nemo_rlhf.config.environment import check_given_environment
from nemo_rlhf.config.sampling import sampling_values
from nemo_rlhf.config.schema import (
    ExpManagerConfig,
    GenerateConfig,
    ILQLConfig,
    ModelConfig,
    PPOConfig,
    RewardModelConfig,
    RFTConfig,
    SFTConfig,
    TrainingConfig,
)
from nemo_rlhf.config.sources import read_sources
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.dialogues import read_dialogues, standardise
from nemo_rlhf.data.files import Source
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.prompts import read_prompts, share_fields
from nemo_rlhf.data.scores import read_scores
from nemo_rlhf.data.texts import read_texts
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.ilql import ILQLModel
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.parallel.strategy import MegatronStrategy
from nemo_rlhf.rollout.collect import make_requests
from nemo_rlhf.rollout.named import load_function
from nemo_rlhf.rollout.score import RewardFunction, Unavailable
from nemo_rlhf.rollout.sources import CalledSource, open_sources
from nemo_rlhf.types import Episode

EXIT_DONE, EXIT_UNAVAILABLE, EXIT_STOPPED = 0, 69, 75


def run_ppo(
    config: PPOConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Source | None = None,
    validation_prompts: Source | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
    env: Callable[[int], Environment] | None = None,
) -> int:
    """Run PPO in this process, which is one rank of the job; returns the exit code.

    What is given as an argument takes the place of the configuration's file or function.

    Raises:
        ValueError: wrong input, the same on every rank.
    """
    if env is not None:
        check_given_environment(config)
    elif config.environment.function is not None:
        env = load_function(config.environment.function, "environment.function")
    if env is None:
        store = open_store(config)
        intake = _intake(config)
        online = _online(config, intake, reward_fn, prompts, validation_prompts, metric_fn)
        return _fit(PPO(config, PPOInputs(**online, store=store, stopping=stop.noted)), config, intake)
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)
    return _fit(PPO(config, PPOInputs(tokenizer, tokenizer_dir, env=env, metric_fn=metric_fn)), config)


def run_rft(
    config: RFTConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Source | None = None,
    validation_prompts: Source | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
) -> int:
    """Run RFT; as ``run_ppo``."""
    intake = _intake(config)
    online = _online(config, intake, reward_fn, prompts, validation_prompts, metric_fn)
    return _fit(RFT(config, RFTInputs(**online)), config, intake)


def _intake(config: TrainingConfig | GenerateConfig) -> Intake:
    return Intake(config.data.fields, config.data.on_error)  # type: ignore[arg-type]


def _read(reader: Callable[..., Any], given: Source | None, configured: str | None, *how: Any, **more: Any) -> Any:
    """What ``reader`` makes of the records given in Python, or else of those that the configuration names."""
    source = configured if given is None else given
    return () if source is None else reader(source, *how, **more)


def _online(
    config: PPOConfig | RFTConfig,
    intake: Intake,
    reward_fn: RewardFunction | None,
    prompts: Source | None,
    validation_prompts: Source | None,
    metric_fn: Callable[..., dict[str, Any]] | None,
) -> dict[str, Any]:
    """The inputs of an algorithm that samples from prompts, once this process has become a rank of its job."""
    sources = _sources(config, reward_fn)
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)

    how = (tokenizer, config.data.max_prompt_length)
    training, validation = share_fields(
        _read(read_prompts, prompts, config.data.prompts, *how, intake=intake),
        _read(read_prompts, validation_prompts, config.data.validation_prompts, *how, intake=intake),
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_dir": tokenizer_dir,
        "prompts": training,
        "validation_prompts": validation,
        "sources": sources,
        "metric_fn": metric_fn,
    }


def _sources(config: PPOConfig | RFTConfig, reward_fn: RewardFunction | None) -> list[CalledSource]:
    if not config.reward.sources:
        return [CalledSource(reward_fn or load_function(str(config.reward.function)))]
    if reward_fn is not None:
        raise ValueError("reward.sources is set in the configuration and reward_fn given in Python: keep one of them.")
    return open_sources(read_sources(config.reward.sources), stop.noted, config.trainer.timeout_s)


def run_sft(config: SFTConfig, *, train: Source | None = None, validation: Source | None = None) -> int:
    """Run supervised fine-tuning; as ``run_ppo``."""
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)

    data, intake = config.data, _intake(config)
    how = (tokenizer, data.max_sequence_length, data.train_on)
    texts = _read(read_texts, train, data.train, *how, top_percent=data.top_percent, intake=intake)
    validation_texts = _read(read_texts, validation, data.validation, *how, intake=intake)
    return _fit(SFT(config, tokenizer, tokenizer_dir, texts, validation_texts), config, intake)


def run_ilql(
    config: ILQLConfig,
    *,
    train: Source | None = None,
    rewards: Sequence[Any] | None = None,
    validation_prompts: Source | None = None,
    reward_fn: RewardFunction | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
    logit_mask: Any = None,
) -> int:
    """Run ILQL; as ``run_ppo``. ``rewards`` are those of ``train``."""
    if reward_fn is None and config.reward.function is not None:
        reward_fn = load_function(config.reward.function)
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)
    data, intake = config.data, _intake(config)
    how: dict[str, Any] = {"too_long": data.too_long, "intake": intake}
    limit = data.max_sequence_length
    dialogues = _read(read_dialogues, train, data.train, tokenizer, limit, rewards=rewards, **how)
    held_out = _read(read_dialogues, None, data.validation, tokenizer, limit, **how)
    if data.standardise_rewards:
        dialogues, held_out = standardise(dialogues, held_out)
    limit = data.max_prompt_length
    prompts = _read(read_prompts, validation_prompts, data.validation_prompts, tokenizer, limit, intake=intake)
    inputs = ILQLInputs(
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        dialogues=dialogues,
        validation_dialogues=held_out,
        validation_prompts=prompts,
        reward_fn=reward_fn,
        metric_fn=metric_fn,
        logit_mask=None if logit_mask is None else torch.as_tensor(logit_mask),
    )
    return _fit(ILQL(config, inputs), config, intake)


def run_reward(config: RewardModelConfig) -> int:
    """Train a reward model; as ``run_ppo``."""
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)
    regression = config.reward_model.loss == "regression"
    kind, read = (ScoreTraining, read_scores) if regression else (PairTraining, read_pairs)
    limit, data, intake = config.data.max_sequence_length, config.data, _intake(config)
    examples = _read(read, None, data.train, tokenizer, limit, intake=intake)
    held_out = _read(read, None, data.validation, tokenizer, limit, intake=intake)
    return _fit(kind(config, tokenizer, tokenizer_dir, examples, held_out), config, intake)


def run_generate(config: GenerateConfig) -> int:
    """Write one response for each prompt to ``config.out``, as jsonl in the order of the prompts."""
    begin(config.model, config.trainer, 0)
    tokenizer, _ = open_tokenizer(ModelConfig(**vars(config.model)), config.data)
    limit = config.data.max_prompt_length
    prompts = read_prompts(str(config.data.prompts), tokenizer, limit, intake=_intake(config))
    model = _open_sampler(config)
    longest = model.architecture.max_position_embeddings
    engine = Engine(model.gpt, tokenizer, num_slots=config.generation.num_slots, max_sequence_length=longest)
    samples = sample(engine, make_requests(prompts, 1, 0), SamplingParams(**sampling_values(config.generation)))
    if dist.get_rank() == 0:
        out = Path(str(config.out))
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        with partial.open("w") as file:
            for one in samples:
                record = {
                    **one.prompt.metadata,
                    "prompt": one.prompt.text,
                    "response": one.text,
                    "finish_reason": one.finish_reason,
                }
                file.write(json.dumps(record, default=str) + "\n")
        partial.replace(out)
    return end(EXIT_DONE)


def run_play(
    config: GenerateConfig,
    env: Callable[[int], Environment],
    num_episodes: int,
    *,
    max_turns: int | None,
    max_sequence_length: int,
    logit_mask: Any,
) -> list[Episode]:
    """As ``nemo_rlhf.play``, in this process, which is one rank of the job."""
    begin(config.model, config.trainer, 0)
    tokenizer, _ = open_tokenizer(ModelConfig(**vars(config.model)))
    model = _open_sampler(config)
    longest = min(max_sequence_length, model.architecture.max_position_embeddings)
    engine = Engine(
        model.gpt,
        tokenizer,
        num_slots=config.generation.num_slots,
        max_sequence_length=longest,
        logit_mask=None if logit_mask is None else torch.as_tensor(logit_mask),
    )
    sampling = SamplingParams(**sampling_values(config.generation))
    episodes = play(engine, tokenizer, env, num_episodes, sampling, max_sequence_length=longest, max_turns=max_turns)
    end(EXIT_DONE)
    return episodes


def _open_sampler(config: GenerateConfig) -> PolicyModel | ILQLModel:
    source = config.model.restore_from
    kind: type[PolicyModel] | type[ILQLModel] = PolicyModel
    if "ilql" in read_architecture(source).heads:
        kind = ILQLModel
    return open_role(kind, ModelConfig(**vars(config.model)), source, config.trainer.precision, 0)


def result_of(run_dir: Path) -> tuple[Metrics, Path]:
    """Metrics of a finished run's last step and its last checkpoint."""
    last = stored_checkpoints(run_dir)[-1]
    return stored_metrics(last)[1], last


def _add_loggers(trainer: Trainer, run_dir: Path, config: ExpManagerConfig) -> None:
    exp_manager(
        trainer,
        OmegaConf.create(
            {
                # a directory of its own: at every start it moves the files of the one before into logs/run_N
                "explicit_log_dir": str(run_dir / "logs"),
                "create_checkpoint_callback": False,  # NeMo's reads steps from file names and cannot skip a damaged one
                "create_tensorboard_logger": config.create_tensorboard_logger,
                "summary_writer_kwargs": {"sub_dir": "../tensorboard"},
                "create_wandb_logger": config.create_wandb_logger,
                "wandb_logger_kwargs": config.wandb_logger_kwargs,
                "log_step_timing": False,
                "seconds_to_sleep": 0,
            }
        ),
    )


def _fit(algorithm: Algorithm, config: TrainingConfig, intake: Intake | None = None) -> int:
    if intake is not None and intake.on_error == "skip":
        algorithm.constants["data/skipped"] = float(len(intake.refused))
    run_dir = algorithm.run_dir
    if not config.exp_manager.resume_if_exists and stored_checkpoints(run_dir):
        raise ValueError(
            f"{run_dir} holds checkpoints of an earlier run: set exp_manager.resume_if_exists=true to continue it, or "
            f"choose another exp_manager.explicit_log_dir."
        )
    metrics = JsonlLogger(run_dir)
    stopping = StopSignals()
    saving = config.exp_manager.checkpoint_callback_params
    checkpoints = Checkpoints(run_dir, saving, stopping)
    show_samples_every = config.ppo.show_samples_every if isinstance(config, PPOConfig) else 0
    progress = [Progress(run_dir, show_samples_every)] if config.trainer.enable_progress_bar else []
    trainer = Trainer(
        accelerator="gpu" if device.is_cuda() else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=MegatronStrategy(config.trainer.timeout_s, async_save=saving.async_save),
        max_steps=algorithm.max_steps,
        max_epochs=-1,
        limit_val_batches=0,  # an algorithm validates inside its step
        log_every_n_steps=config.trainer.log_every_n_steps,
        logger=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[stopping, checkpoints, *progress],
    )
    _add_loggers(trainer, run_dir, config.exp_manager)
    trainer.loggers = [metrics, *trainer.loggers]
    resume = newest_whole_checkpoint(run_dir) if config.exp_manager.resume_if_exists else None
    remove_unfinished(run_dir)
    done = int(resume.name.removeprefix("step_")) if resume else -1
    metrics.rewind(done)
    if dist.get_rank() == 0:
        used = kernels(config.model, config.trainer)
        (run_dir / "config.yaml").write_text(f"# {used}\n{dump(config)}")
    code, said = EXIT_DONE, ""
    with stop.heeded():
        try:
            trainer.fit(algorithm, ckpt_path=resume)
        except Unavailable as error:
            code = EXIT_UNAVAILABLE
            said = f"{error} Steps done and saved: {algorithm.completed_steps}; the same command goes on from there."
        else:
            if not algorithm.metrics:  # nothing was left to do
                said = f"{run_dir} has all {done} steps; raise trainer.max_steps (or max_epochs) to go on."
    if stopping.requested and (code or algorithm.completed_steps < algorithm.max_steps):
        code = EXIT_STOPPED
        after = f"step {algorithm.completed_steps}, which is saved" if algorithm.completed_steps else "no step"
        said = said or f"{stopping.requested.name} ended the run after {after}; the same command goes on from there."
    if dist.get_rank() == 0:
        if said:
            print(f"nemo-rlhf: {said}", file=sys.stderr)
        if metrics.path.exists():
            write_report(run_dir)
    return end(code)
