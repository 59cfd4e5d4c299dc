"""Reinforcement learning for language models too large for one machine: PPO on megatron-core, NeMo, Hydra and SLURM.

``train`` is the call for Python programs; the console program ``nemo-rlhf`` does the same from configuration files.
Importing this package loads nothing heavy.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_rlhf.config.schema import ILQLConfig, PPOConfig, SFTConfig

__version__ = "0.1.0"
__all__ = ["TrainResult", "__version__", "config", "train"]

_EXIT_STOPPED = 75


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves: metrics of its last step, and the checkpoint to go on from (a directory that
    ``train(model_path=...)``, ``nemo-rlhf generate`` and ``nemo-rlhf convert export`` take)."""

    metrics: Mapping[str, float]
    checkpoint: Path
    run_dir: Path


def train(
    model_path: str | Path,
    *,
    reward_fn: Callable[..., Any] | None = None,
    prompts: Sequence[Any] | str | None = None,
    eval_prompts: Sequence[Any] | str | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
    samples: Sequence[Any] | str | None = None,
    eval_samples: Sequence[Any] | str | None = None,
    rewards: Sequence[Any] | None = None,
    config: PPOConfig | SFTConfig | ILQLConfig | None = None,
    stop_sequences: Sequence[str] = (),
) -> TrainResult:
    """Train a model: PPO with ``reward_fn`` and ``prompts``, ILQL with ``samples`` and ``rewards``, supervised
    fine-tuning with ``samples`` alone.

    The same program runs under ``python``, ``torchrun`` and ``srun``; under ``python`` with several devices it starts
    itself once for each, so what stands before this call runs in every process.

    Args:
        model_path: Hugging Face directory or Megatron checkpoint.
        reward_fn: called as ``reward_fn(samples=, prompts=, outputs=, tokenizer=, **metadata)`` with lists of str;
            returns one number a sample, or a list with one a response token. With ``rewards`` it only scores the
            samples of validation.
        prompts, eval_prompts: strings, dicts with "prompt" and metadata, or a file of them. ILQL uses the latter only.
        metric_fn: called as ``reward_fn`` is; returns numbers, or lists of them, by name, logged as ``val/<name>``.
        samples: strings (all of it is learned), [prompt, output, prompt, output, ...] lists (outputs are learned),
            dicts as in SFT files, or a file of them. ``eval_samples``: the same, for the validation loss.
        rewards: of ``samples``, for offline reinforcement learning: for each one number, a list with one for each of
            the agent's turns, or a list with one for each of its tokens. A file of samples may have them itself: then
            ``config`` (an ILQLConfig) says what is meant.
        config: from ``nemo_rlhf.config("ppo", "ilql" or "sft", overrides=[...])``; by default that with a run
            directory under ``runs/``.
        stop_sequences: strings that end a response, beside ``generation.stop``.

    Raises:
        ValueError: wrong input, in one sentence.
        SystemExit: with code 75, when a signal stopped the run after it saved.
    """
    command = _command(reward_fn, samples, rewards, config)
    checked = _checked(command, config)
    if command == "sft":
        stops = stop_sequences or None
        _refuse("samples", prompts=prompts, eval_prompts=eval_prompts, metric_fn=metric_fn, stop_sequences=stops)
    else:
        given = "reward_fn" if command == "ppo" else "rewards"
        _refuse(given, eval_samples=eval_samples, **({"prompts": prompts} if command == "ilql" else {}))
        checked.generation.stop = [*checked.generation.stop, *stop_sequences]
    if command == "ppo" and prompts is None and checked.data.prompts is None:
        raise ValueError("train(reward_fn=...) needs prompts, as an argument or as data.prompts.")
    checked.model.restore_from = str(model_path)

    from nemo_rlhf.cli.launch import launch_if_needed
    from nemo_rlhf.cli.stop import heeded

    launch_if_needed(checked.trainer.devices, checked.trainer.num_nodes)
    with heeded():
        from nemo_rlhf.cli.run import result_of, run_ilql, run_ppo, run_sft

        score: dict[str, Any] = {"validation_prompts": eval_prompts, "reward_fn": reward_fn, "metric_fn": metric_fn}
        if command == "ppo":
            code = run_ppo(checked, prompts=prompts, **score)
        elif command == "ilql":
            code = run_ilql(checked, train=samples, rewards=rewards, **score)
        else:
            code = run_sft(checked, train=samples, validation=eval_samples)
    if code == _EXIT_STOPPED:
        raise SystemExit(code)
    metrics, checkpoint = result_of(Path(checked.exp_manager.explicit_log_dir))
    return TrainResult(metrics, checkpoint, Path(checked.exp_manager.explicit_log_dir))


def _command(reward_fn: Any, samples: Any, rewards: Any, config: Any) -> str:
    """What the arguments of ``train`` ask for: "ppo", "ilql" or "sft"."""
    if rewards is not None and samples is None:
        raise ValueError("train(rewards=...) needs samples, whose rewards they are.")
    if rewards is not None or (samples is not None and type(config).__name__ == "ILQLConfig"):
        return "ilql"
    if (reward_fn is None) == (samples is None):
        raise ValueError(
            "train() needs either reward_fn and prompts, for PPO, or samples: with rewards for ILQL, alone for "
            "supervised fine-tuning."
        )
    return "ppo" if samples is None else "sft"


def _checked(command: str, config: PPOConfig | SFTConfig | ILQLConfig | None) -> Any:
    """A copy of ``config``, which the caller may use again, or the default for ``command``."""
    configuration: Any = importlib.import_module("nemo_rlhf.config")  # a module that can be called
    if config is None:
        return configuration(command, overrides=[f"exp_manager.explicit_log_dir=runs/{command}"])
    kinds = {"ppo": configuration.PPOConfig, "sft": configuration.SFTConfig, "ilql": configuration.ILQLConfig}
    if not isinstance(config, kinds[command]):
        raise ValueError(f'this call of train() needs a configuration from nemo_rlhf.config("{command}", ...).')
    return copy.deepcopy(config)


def _refuse(given: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"train({given}=...) has no use for {name}: leave it out.")


def __getattr__(name: str) -> Any:
    if name == "config":  # imported on first use
        return importlib.import_module("nemo_rlhf.config")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
