"""From a configuration to a finished run: data, algorithm, Lightning's trainer, NeMo's exp_manager, exit code."""

from __future__ import annotations

import atexit
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# NeMo's telemetry is off by default and says so at import, on every rank
for _name in ("nv_one_logger.api.config", "nv_one_logger.training_telemetry.api.training_telemetry_provider"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# and megatron-core, in every module, that it found no accelerators, which nothing here requires
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_rlhf import device
from nemo_rlhf.algorithms.base import Algorithm, Metrics, stored_metrics
from nemo_rlhf.algorithms.evaluate import sample
from nemo_rlhf.algorithms.ilql import ILQL, ILQLInputs
from nemo_rlhf.algorithms.play import Environment, play
from nemo_rlhf.algorithms.ppo import PPO, PPOInputs
from nemo_rlhf.algorithms.reward import RewardTraining
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
from nemo_rlhf.cli.report import write_report
from nemo_rlhf.config import dump
from nemo_rlhf.config.sampling import sampling_values
from nemo_rlhf.config.schema import (
    BaseModelConfig,
    GenerateConfig,
    HardwareConfig,
    ILQLConfig,
    ModelConfig,
    PPOConfig,
    RewardModelConfig,
    RFTConfig,
    SFTConfig,
    TrainingConfig,
)
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.dialogues import read_dialogues, standardise
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.prompts import read_prompts, share_fields
from nemo_rlhf.data.records import Source
from nemo_rlhf.data.texts import read_texts
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.ilql import ILQLModel
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.strategy import MegatronStrategy
from nemo_rlhf.rollout.collect import make_requests
from nemo_rlhf.rollout.score import RewardFunction, load_reward_function
from nemo_rlhf.types import Episode

EXIT_DONE, EXIT_STOPPED = 0, 75
_NOISY = ("lightning.pytorch", "lightning.fabric", "megatron.core", "torch.distributed")
_clean = False  # whether what this process last began has ended well


def run_ppo(
    config: PPOConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Source | None = None,
    validation_prompts: Source | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
) -> int:
    """Run PPO in this process, which is one rank of the job; returns the exit code.

    What is given as an argument takes the place of the configuration's file or function.

    Raises:
        ValueError: wrong input, the same on every rank.
    """
    return _fit(PPO(config, PPOInputs(**_online(config, reward_fn, prompts, validation_prompts, metric_fn))), config)


def run_rft(
    config: RFTConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Source | None = None,
    validation_prompts: Source | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
) -> int:
    """Run RFT; as ``run_ppo``."""
    return _fit(RFT(config, RFTInputs(**_online(config, reward_fn, prompts, validation_prompts, metric_fn))), config)


def _online(
    config: PPOConfig | RFTConfig,
    reward_fn: RewardFunction | None,
    prompts: Source | None,
    validation_prompts: Source | None,
    metric_fn: Callable[..., dict[str, Any]] | None,
) -> dict[str, Any]:
    """The inputs of an algorithm that samples from prompts, once this process has become a rank of its job."""
    reward_fn = reward_fn or load_reward_function(str(config.reward.function))
    _begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model)

    def read(source: Source | None) -> Any:
        return read_prompts(source, tokenizer, config.data.max_prompt_length) if source is not None else ()

    training, validation = share_fields(
        read(prompts if prompts is not None else config.data.prompts),
        read(validation_prompts if validation_prompts is not None else config.data.validation_prompts),
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_dir": tokenizer_dir,
        "prompts": training,
        "validation_prompts": validation,
        "reward_fn": reward_fn,
        "metric_fn": metric_fn,
    }


def run_sft(config: SFTConfig, *, train: Source | None = None, validation: Source | None = None) -> int:
    """Run supervised fine-tuning; as ``run_ppo``."""
    _begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model)

    data = config.data

    def read(source: Source | None, top_percent: float = 100.0) -> Any:
        if source is None:
            return ()
        limit, train_on = data.max_sequence_length, data.train_on
        return read_texts(source, tokenizer, limit, train_on, top_percent=top_percent)  # type: ignore[arg-type]

    texts = read(train if train is not None else data.train, data.top_percent)
    validation_texts = read(validation if validation is not None else data.validation)
    return _fit(SFT(config, tokenizer, tokenizer_dir, texts, validation_texts), config)


def run_ilql(
    config: ILQLConfig,
    *,
    train: Source | None = None,
    rewards: Sequence[Any] | None = None,
    validation_prompts: Source | None = None,
    reward_fn: RewardFunction | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
) -> int:
    """Run ILQL; as ``run_ppo``. ``rewards`` are those of ``train``."""
    if reward_fn is None and config.reward.function is not None:
        reward_fn = load_reward_function(config.reward.function)
    _begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model)
    data = config.data

    def read(source: Source | None, given: Sequence[Any] | None = None) -> Any:
        if source is None:
            return ()
        limit, too_long = data.max_sequence_length, data.too_long
        return read_dialogues(source, tokenizer, limit, rewards=given, too_long=too_long)  # type: ignore[arg-type]

    dialogues, held_out = read(train if train is not None else data.train, rewards), read(data.validation)
    if data.standardise_rewards:
        dialogues, held_out = standardise(dialogues, held_out)
    prompts = validation_prompts if validation_prompts is not None else data.validation_prompts
    inputs = ILQLInputs(
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        dialogues=dialogues,
        validation_dialogues=held_out,
        validation_prompts=() if prompts is None else read_prompts(prompts, tokenizer, data.max_prompt_length),
        reward_fn=reward_fn,
        metric_fn=metric_fn,
    )
    return _fit(ILQL(config, inputs), config)


def run_reward(config: RewardModelConfig) -> int:
    """Train a reward model; as ``run_ppo``."""
    _begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model)
    limit, data = config.data.max_sequence_length, config.data
    pairs = read_pairs(str(data.train), tokenizer, limit)
    held_out = read_pairs(data.validation, tokenizer, limit) if data.validation else ()
    return _fit(RewardTraining(config, tokenizer, tokenizer_dir, pairs, held_out), config)


def run_generate(config: GenerateConfig) -> int:
    """Write one response for each prompt to ``config.out``, as jsonl in the order of the prompts."""
    _begin(config.model, config.trainer, 0)
    tokenizer, _ = open_tokenizer(ModelConfig(**vars(config.model)))
    prompts = read_prompts(str(config.data.prompts), tokenizer, config.data.max_prompt_length)
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
    return _end(EXIT_DONE)


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
    _begin(config.model, config.trainer, 0)
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
    _end(EXIT_DONE)
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


def _leave() -> None:
    """Part with the other ranks at the end of the process; after a failure they may no longer answer."""
    if _clean and dist.is_initialized():
        dist.destroy_process_group()


def _begin(model: BaseModelConfig, trainer: HardwareConfig, seed: int) -> None:
    global _clean
    _clean = False
    atexit.unregister(_leave)
    atexit.register(_leave)
    state.set_environment_for_one_process()
    state.initialize(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        seed,
        timeout_s=trainer.timeout_s,
        expert_parallel=model.expert_model_parallel_size,
    )
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.CRITICAL)  # what it logs, it raises too
    nemo_logging.setLevel(nemo_logging.ERROR)
    nemo_logging.captureWarnings(False)  # it would hold back ours as well
    warnings.filterwarnings("ignore", module=r"(lightning|megatron|nemo|torch)\b")  # their own business
    if dist.get_rank():
        warnings.simplefilter("ignore")  # rank 0 says it for all


def _fit(algorithm: Algorithm, config: TrainingConfig) -> int:
    run_dir = algorithm.run_dir
    if not config.exp_manager.resume_if_exists and stored_checkpoints(run_dir):
        raise ValueError(
            f"{run_dir} holds checkpoints of an earlier run: set exp_manager.resume_if_exists=true to continue it, or "
            f"choose another exp_manager.explicit_log_dir."
        )
    metrics = JsonlLogger(run_dir)
    stopping = StopSignals()
    checkpoints = Checkpoints(run_dir, config.exp_manager.checkpoint_callback_params, stopping)
    callbacks: Sequence[Any] = [stopping, checkpoints, *([Progress()] if config.trainer.enable_progress_bar else [])]
    trainer = Trainer(
        accelerator="gpu" if device.is_cuda() else "cpu",
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=MegatronStrategy(config.trainer.timeout_s),
        max_steps=algorithm.max_steps,
        max_epochs=-1,
        limit_val_batches=0,  # an algorithm validates inside its step
        log_every_n_steps=config.trainer.log_every_n_steps,
        logger=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    )
    exp_manager(
        trainer,
        OmegaConf.create(
            {
                # a directory of its own: at every start it moves the files of the one before into logs/run_N
                "explicit_log_dir": str(run_dir / "logs"),
                "create_checkpoint_callback": False,  # NeMo's reads steps from file names and cannot skip a damaged one
                "create_tensorboard_logger": config.exp_manager.create_tensorboard_logger,
                "summary_writer_kwargs": {"sub_dir": "../tensorboard"},
                "create_wandb_logger": config.exp_manager.create_wandb_logger,
                "wandb_logger_kwargs": config.exp_manager.wandb_logger_kwargs,
                "log_step_timing": False,
                "seconds_to_sleep": 0,
            }
        ),
    )
    trainer.loggers = [metrics, *trainer.loggers]
    resume = newest_whole_checkpoint(run_dir) if config.exp_manager.resume_if_exists else None
    remove_unfinished(run_dir)
    done = int(resume.name.removeprefix("step_")) if resume else -1
    metrics.rewind(done)
    if dist.get_rank() == 0:
        (run_dir / "config.yaml").write_text(dump(config))
        if done >= algorithm.max_steps:
            how = "raise trainer.max_steps (or max_epochs) to go on."
            print(f"nemo-rlhf: {run_dir} has all {done} steps; {how}", file=sys.stderr)
    with stop.heeded():
        trainer.fit(algorithm, ckpt_path=resume)
    if dist.get_rank() == 0 and metrics.path.exists():
        write_report(run_dir)
    stopped = stopping.requested and algorithm.completed_steps < algorithm.max_steps
    return _end(EXIT_STOPPED if stopped else EXIT_DONE)


def _end(code: int) -> int:
    """All ranks end together."""
    global _clean
    dist.barrier()
    _clean = True
    return code
