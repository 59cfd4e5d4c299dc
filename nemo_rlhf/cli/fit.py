"""What every training run does with its algorithm: directory, Lightning's trainer, NeMo's exp_manager, exit code."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from lightning.pytorch import Trainer
from nemo.utils.exp_manager import exp_manager
from omegaconf import OmegaConf

from nemo_rlhf import device
from nemo_rlhf.algorithms.base import Algorithm, Metrics, stored_metrics
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
from nemo_rlhf.cli.rank import end, kernels
from nemo_rlhf.cli.report import write_report
from nemo_rlhf.cli.run_directory import Code, Data, check_resumption, held, origin, write_config
from nemo_rlhf.config import dump
from nemo_rlhf.config.dumping import masked_word
from nemo_rlhf.config.schema import ExpManagerConfig, PPOConfig, TrainingConfig
from nemo_rlhf.parallel.strategy import MegatronStrategy
from nemo_rlhf.rollout.score import Unavailable

EXIT_DONE, EXIT_UNAVAILABLE, EXIT_STOPPED = 0, 69, 75


def result_of(run_dir: Path) -> tuple[Metrics, Path]:
    """Metrics of a finished run's last step and its last checkpoint."""
    last = stored_checkpoints(run_dir)[-1]
    return stored_metrics(last)[1], last


def _add_loggers(trainer: Trainer, run_dir: Path, config: ExpManagerConfig) -> None:
    settings = OmegaConf.create(
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
    )
    # NeMo writes the command line into a file, which others may read
    with patch.object(sys, "argv", [masked_word(word) for word in sys.argv]):
        exp_manager(trainer, settings)


def _report(run_dir: Path) -> None:
    """Write the page. The run is done and saved: what goes wrong here does not decide how it ends."""
    try:
        write_report(run_dir)
    except Exception as error:
        warnings.warn(f"report.html was not written ({error!r}): nemo-rlhf report {run_dir} tries again.", stacklevel=2)


def fit(algorithm: Algorithm, config: TrainingConfig, data: Data, code: Code) -> int:
    """Train in the run's directory. ``data``: all that is learned from and validated on; ``code``: people's."""
    algorithm.origin = {**origin(config, data, code), "date": algorithm.tokenizer.chat_date.isoformat()}
    with held(algorithm.run_dir):
        return _fit_alone(algorithm, config)


def _fit_alone(algorithm: Algorithm, config: TrainingConfig) -> int:
    run_dir = algorithm.run_dir
    if not config.exp_manager.resume_if_exists and stored_checkpoints(run_dir):
        raise ValueError(
            f"{run_dir} holds checkpoints of an earlier run: set exp_manager.resume_if_exists=true to continue it, or "
            f"choose another exp_manager.explicit_log_dir."
        )
    resume = newest_whole_checkpoint(run_dir) if config.exp_manager.resume_if_exists else None
    if resume is not None:
        check_resumption(config, algorithm.origin, resume)
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
    remove_unfinished(run_dir)
    done = int(resume.name.removeprefix("step_")) if resume else -1
    metrics.rewind(done)
    write_config(run_dir, f"# {kernels(config.model, config.trainer)}\n{dump(config)}")
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
            _report(run_dir)
    return end(code)
