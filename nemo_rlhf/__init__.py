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
    from nemo_rlhf.algorithms.play import Environment
    from nemo_rlhf.config.schema import GenerateConfig, ILQLConfig, PPOConfig, RFTConfig, SFTConfig
    from nemo_rlhf.types import Episode

__version__ = "0.1.0"
__all__ = ["TrainResult", "__version__", "config", "play", "train"]

_EXITS_AFTER_SAVING = (69, 75)


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
    env: Callable[[int], Environment] | None = None,
    samples: Sequence[Any] | str | None = None,
    eval_samples: Sequence[Any] | str | None = None,
    rewards: Sequence[Any] | None = None,
    config: PPOConfig | SFTConfig | ILQLConfig | RFTConfig | None = None,
    stop_sequences: Sequence[str] = (),
    logit_mask: Any = None,
) -> TrainResult:
    """Train a model: PPO with ``reward_fn`` and ``prompts`` or with ``env``, RFT with an RFTConfig beside the former,
    ILQL with ``samples`` and ``rewards``, supervised fine-tuning with ``samples`` alone.

    The same program runs under ``python``, ``torchrun`` and ``srun``; under ``python`` with several devices it starts
    itself once for each, so what stands before this call runs in every process.

    Args:
        model_path: Hugging Face directory or Megatron checkpoint.
        reward_fn: called as ``reward_fn(samples=, prompts=, outputs=, tokenizer=, **metadata)`` with lists of str;
            returns one number a sample, or a list with one a response token. With ``rewards`` it only scores the
            samples of validation. ``config`` may name a function or ``reward.sources`` instead.
        prompts, eval_prompts: strings, dicts with "prompt" and metadata, or a file of them. ILQL uses the latter only.
        metric_fn: called as ``reward_fn`` is; returns numbers, or lists of them, by name, logged as ``val/<name>``.
        env: called with an episode's number; returns its environment, as in ``play``. The policy acts in it over
            several turns, and what ``step`` gives for each is its reward (``environment.*`` in the configuration).
        samples: strings (all of it is learned), [prompt, output, prompt, output, ...] lists (outputs are learned),
            dicts as in SFT files, or a file of them. ``eval_samples``: the same, for the validation loss.
        rewards: of ``samples``, for offline reinforcement learning: for each one number, a list with one for each of
            the agent's turns, or a list with one for each of its tokens. A file of samples may have them itself: then
            ``config`` (an ILQLConfig) says what is meant.
        config: from ``nemo_rlhf.config("ppo", "rft", "ilql" or "sft", overrides=[...])``; by default that with a run
            directory under ``runs/``, PPO where there are prompts.
        stop_sequences: strings that end a response, beside ``generation.stop``.
        logit_mask: as in ``play``; limits what ILQL samples in validation.

    Raises:
        ValueError: wrong input, in one sentence.
        SystemExit: when the run stopped after it saved: code 75, a signal; 69, a source of rewards stayed away.
    """
    online = {"reward_fn": reward_fn, "prompts": prompts, "eval_prompts": eval_prompts, "env": env}
    offline = {"samples": samples, "eval_samples": eval_samples, "rewards": rewards}
    both = {"metric_fn": metric_fn, "stop_sequences": stop_sequences or None, "logit_mask": logit_mask}
    arguments: dict[str, Any] = {**online, **offline, **both}
    given = {name: value for name, value in arguments.items() if value is not None}
    command = _command(given, config)
    checked = _checked(command, config)
    checked.model.restore_from = _absolute(model_path)
    arguments |= {name: _located(value) for name, value in arguments.items() if name in _DATA}
    _check_arguments(command, given, checked)
    if command != "sft":
        checked.generation.stop = [*checked.generation.stop, *stop_sequences]

    from nemo_rlhf.cli.launch import launch_if_needed
    from nemo_rlhf.cli.stop import heeded

    launch_if_needed(checked.trainer.devices, checked.trainer.num_nodes, checked.model.tensor_model_parallel_size)
    with heeded():
        from nemo_rlhf.cli.fit import result_of

        code = _run(command, checked, arguments)
    if code in _EXITS_AFTER_SAVING:
        raise SystemExit(code)
    metrics, checkpoint = result_of(Path(checked.exp_manager.explicit_log_dir))
    return TrainResult(metrics, checkpoint, Path(checked.exp_manager.explicit_log_dir))


def play(
    model_path: str | Path,
    env: Callable[[int], Environment],
    *,
    num_episodes: int,
    config: GenerateConfig | None = None,
    max_turns: int | None = None,
    max_sequence_length: int = 2048,
    logit_mask: Any = None,
) -> list[Episode]:
    """Let a model act in an environment over several turns; many episodes go on at once in the model's slots.

    A turn ends as a generated response does: with EOS, a string of ``generation.stop`` or after
    ``generation.max_new_tokens``. What the environment says next is appended to the tokens that were sampled, whose
    key-value cache is kept. The same program runs under ``python``, ``torchrun`` and ``srun``; environments are made
    and called on one rank of each replica, and every rank returns the same episodes. They can be learned from again:
    ``train(samples=[{"turns": e.turns, "rewards": e.rewards, "done": e.done} for e in episodes], config=...)``.

    Args:
        model_path: Hugging Face directory or Megatron checkpoint.
        env: called with an episode's number, counted from 0; returns its environment, which has ``reset() -> text``
            and ``step(text) -> (text, reward, done)``.
        num_episodes: over all replicas.
        config: from ``nemo_rlhf.config("generate", overrides=[...])``: sampling, guidance by an ILQL model's values
            (``generation.beta``), number of slots, parallelism.
        max_turns: an episode ends after this many turns of the agent; None: when the environment says so.
        max_sequence_length: tokens of an episode, or what the model was made for where that is less; it ends where
            another turn would not fit. Every slot's cache is as long.
        logit_mask: [vocabulary, vocabulary] bool, whether a token (second index) may follow the one before it.

    Raises:
        ValueError: wrong input, or an environment failed, in one sentence, on every rank.
    """
    configuration: Any = importlib.import_module("nemo_rlhf.config")
    if config is None:
        config = configuration("generate")
    if not isinstance(config, configuration.GenerateConfig):
        raise ValueError('play() needs a configuration from nemo_rlhf.config("generate", ...).')
    checked = copy.deepcopy(config)
    checked.model.restore_from = _absolute(model_path)

    from nemo_rlhf.cli.launch import launch_if_needed

    launch_if_needed(checked.trainer.devices, checked.trainer.num_nodes, checked.model.tensor_model_parallel_size)
    from nemo_rlhf.cli.run import run_play

    return run_play(
        checked,
        env,
        num_episodes,
        max_turns=max_turns,
        max_sequence_length=max_sequence_length,
        logit_mask=logit_mask,
    )


_DATA = ("prompts", "eval_prompts", "samples", "eval_samples")


def _absolute(path: str | Path) -> str:
    """What is imported later may change the working directory."""
    from nemo_rlhf.config.paths import located

    return located(path)


def _located(data: Any) -> Any:
    """Data of ``train`` as they are, or the path of their file from the root."""
    return _absolute(data) if isinstance(data, str | Path) and Path(data).expanduser().exists() else data


# What goes with each of the arguments of ``train`` that say what it is to do.
_USES: dict[str, tuple[str, ...]] = {
    "samples": ("eval_samples",),
    "rewards": ("samples", "reward_fn", "eval_prompts", "metric_fn", "stop_sequences", "logit_mask"),
    "reward_fn": ("prompts", "eval_prompts", "metric_fn", "stop_sequences"),
    "env": ("metric_fn", "stop_sequences"),
}


def _has_env(given: Mapping[str, Any], config: Any) -> bool:
    return "env" in given or (type(config).__name__ == "PPOConfig" and config.environment.function is not None)


def _command(given: Mapping[str, Any], config: Any) -> str:
    """What the arguments of ``train`` ask for: "ppo", "rft", "ilql" or "sft"."""
    if "rewards" in given and "samples" not in given:
        raise ValueError("train(rewards=...) needs samples, whose rewards they are.")
    if "rewards" in given or ("samples" in given and type(config).__name__ == "ILQLConfig"):
        return "ilql"
    if _has_env(given, config):
        return "ppo"
    online = type(config).__name__ in ("PPOConfig", "RFTConfig")
    has_reward = "reward_fn" in given or (online and bool(config.reward.function or config.reward.sources))
    if has_reward == ("samples" in given):
        raise ValueError(
            "train() needs either reward_fn and prompts, or env, for PPO, or samples: with rewards for ILQL, alone for "
            "supervised fine-tuning."
        )
    if "samples" in given:
        return "sft"
    return "rft" if type(config).__name__ == "RFTConfig" else "ppo"


def _check_arguments(command: str, given: Mapping[str, Any], config: Any) -> None:
    """Raises ValueError for an argument that has no use beside the others, and for prompts that are missing."""
    online = "env" if _has_env(given, config) else "reward_fn"
    use = {"sft": "samples", "ilql": "rewards"}.get(command, online)
    for name in given:
        if name not in (use, *_USES[use]):
            raise ValueError(f"train({use}=...) has no use for {name}: leave it out.")
    if use == "reward_fn" and "prompts" not in given and config.data.prompts is None:
        raise ValueError("train(reward_fn=...) needs prompts, as an argument or as data.prompts.")


def _run(command: str, config: Any, arguments: Mapping[str, Any]) -> int:
    """In this process, which is one rank of the job; returns the exit code."""
    from nemo_rlhf.cli.run import run_ilql, run_ppo, run_rft, run_sft

    if command == "sft":
        return run_sft(config, train=arguments["samples"], validation=arguments["eval_samples"])
    shared: dict[str, Any] = {name: arguments[name] for name in ("reward_fn", "metric_fn")}
    shared["validation_prompts"] = arguments["eval_prompts"]
    if command == "ilql":
        ilql = {name: arguments[name] for name in ("rewards", "logit_mask")}
        return run_ilql(config, train=arguments["samples"], **ilql, **shared)
    if command == "rft":
        return run_rft(config, prompts=arguments["prompts"], **shared)
    return run_ppo(config, prompts=arguments["prompts"], env=arguments["env"], **shared)


def _checked(command: str, config: PPOConfig | SFTConfig | ILQLConfig | RFTConfig | None) -> Any:
    """A copy of ``config``, which the caller may use again, or the default for ``command``."""
    configuration: Any = importlib.import_module("nemo_rlhf.config")  # a module that can be called
    if config is None:
        return configuration(command, overrides=[f"exp_manager.explicit_log_dir=runs/{command}"])
    if type(config).__name__ != f"{command.upper()}Config":
        raise ValueError(f'this call of train() needs a configuration from nemo_rlhf.config("{command}", ...).')
    return copy.deepcopy(config)


def __getattr__(name: str) -> Any:
    if name == "config":  # imported on first use
        return importlib.import_module("nemo_rlhf.config")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
