"""What a configuration must obey beyond its types: ranges of single keys, and rules between keys.

Each rule is a small function that raises ValueError with one sentence: the keys, their values, what to change.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_rlhf.config.sampling import SWEEPABLE, sampling_sweep
from nemo_rlhf.config.schema import REQUIRED, Config, GenerateConfig, PPOConfig, SFTConfig

Rule = tuple[str, Callable[[Any], bool]]

_INFINITY = float("inf")
_FRACTION: Rule = ("between 0 and 1", lambda x: 0 <= x <= 1)
_POSITIVE: Rule = ("greater than 0", lambda x: 0 < x < _INFINITY)
_NOT_NEGATIVE: Rule = ("0 or more", lambda x: 0 <= x < _INFINITY)
_COUNT: Rule = ("1 or more", lambda x: x >= 1)

_OPTIM_RANGES: dict[str, Rule] = {
    "lr": _POSITIVE,
    "eps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "clip_grad": _NOT_NEGATIVE,
    "sched.warmup_steps": _NOT_NEGATIVE,
    "sched.min_lr": _NOT_NEGATIVE,
}

# Ranges of single keys; null passes where the schema allows it.
RANGES: dict[str, Rule] = {
    "seed": _NOT_NEGATIVE,
    "trainer.devices": _COUNT,
    "trainer.num_nodes": _COUNT,
    "trainer.timeout_s": _COUNT,
    "trainer.max_steps": _COUNT,
    "trainer.val_check_interval": _NOT_NEGATIVE,
    "trainer.log_every_n_steps": _COUNT,
    "exp_manager.checkpoint_callback_params.every_n_train_steps": _COUNT,
    "exp_manager.checkpoint_callback_params.save_last_k": _COUNT,
    "model.tensor_model_parallel_size": _COUNT,
    "model.pipeline_model_parallel_size": _COUNT,
    "model.micro_batch_size": _COUNT,
    "model.global_batch_size": _COUNT,
    **{f"model.optim.{key}": rule for key, rule in _OPTIM_RANGES.items()},
    **{f"model.critic.optim.{key}": rule for key, rule in _OPTIM_RANGES.items()},
    "ppo.num_prompts": _COUNT,
    "ppo.samples_per_prompt": _COUNT,
    "ppo.epochs": _COUNT,
    "ppo.minibatch_size": _COUNT,
    "ppo.gamma": _FRACTION,
    "ppo.lam": _FRACTION,
    "ppo.clip_low": ("greater than 0 and at most 1", lambda x: 0 < x <= 1),
    "ppo.clip_high": _POSITIVE,
    "ppo.dual_clip": ("greater than 1 or null", lambda x: 1 < x < _INFINITY),
    "ppo.value_clip": _POSITIVE,
    "ppo.entropy_coef": _NOT_NEGATIVE,
    "ppo.kl.coef": _NOT_NEGATIVE,
    "ppo.kl.target": ("greater than 0 or null", lambda x: 0 < x < _INFINITY),
    "ppo.kl.horizon": _COUNT,
    "ppo.reward_clip": ("greater than 0 or null", lambda x: 0 < x < _INFINITY),
    "ppo.target_kl": ("greater than 0 or null", lambda x: 0 < x < _INFINITY),
    "ppo.critic_warmup_steps": _NOT_NEGATIVE,
    "generation.num_slots": _COUNT,
    "data.max_prompt_length": _COUNT,
    "data.max_sequence_length": ("2 or more", lambda x: x >= 2),
}

_SCHEDULES = ("constant", "cosine", "linear")

# Keys that take one of a few words; None stands for null.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "trainer.precision": ("32", "bf16"),
    "exp_manager.checkpoint_callback_params.mode": ("max", "min"),
    "model.init": ("pretrained", "random"),
    "model.activations_checkpoint_granularity": (None, "selective", "full"),
    "model.optim.sched.name": _SCHEDULES,
    "model.critic.optim.sched.name": _SCHEDULES,
    "ppo.kl.estimator": ("k1", "k2", "k3", "abs"),
    "ppo.reward_scaling": ("none", "running", "reference"),
    "ppo.reference": ("resident", "swap"),
    "data.train_on": ("response", "all"),
}

OFFLOADABLE = ("optimizer", "critic", "reference")

_SAMPLING_RANGES: dict[str, Rule] = {
    "max_new_tokens": _COUNT,
    "temperature": _NOT_NEGATIVE,
    "top_k": _NOT_NEGATIVE,
    "top_p": ("greater than 0 and at most 1", lambda x: 0 < x <= 1),
    "seed": _NOT_NEGATIVE,
}


def require_keys(node: DictConfig, command: str, supplied: Collection[str] = ()) -> None:
    """Raises ValueError that shows how to set the required keys that ``node`` lacks; ``supplied`` are those that
    the caller has in memory instead, and they must not be set as well."""
    examples = REQUIRED[command]
    unset = [
        key for key in examples if OmegaConf.is_missing(*_parent(node, key)) or OmegaConf.select(node, key) is None
    ]
    missing = [key for key in examples if key in unset and key not in supplied]
    if missing:
        example = " ".join(f"{key}={examples[key]}" for key in missing)
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{' and '.join(missing)} {verb} not set: add it to your yaml file or say, e.g., {example}.")
    for key in supplied:
        if OmegaConf.select(node, key, throw_on_missing=False) is not None:
            raise ValueError(f"{key} is set in the configuration and given in Python too: keep one of them.")


def validate(cfg: Config) -> None:
    """Raises ValueError for the first rule that ``cfg`` breaks; warns of what is allowed but rarely meant."""
    check_ranges(cfg)
    check_choices(cfg)
    check_sampling(cfg)
    check_world_size(cfg)
    if isinstance(cfg, GenerateConfig):
        return
    check_sequence_parallel(cfg)
    check_betas(cfg)
    check_schedules(cfg)
    check_monitor(cfg)
    check_batch_size(cfg)
    if isinstance(cfg, PPOConfig):
        check_rollout_batch(cfg)
        check_rollout_temperature(cfg)
        check_offload(cfg)
        check_reward_function(cfg)
        warn_truncated_rollouts(cfg)


def data_parallel_size(cfg: Config) -> int:
    """Data-parallel ranks of the whole job."""
    model = cfg.model
    world_size = cfg.trainer.devices * cfg.trainer.num_nodes
    return world_size // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size)


def check_ranges(cfg: Config) -> None:
    for key, (words, holds) in RANGES.items():
        value = _get(cfg, key)
        if value is not None and not holds(value):
            raise ValueError(f"{key}={value} is out of range: it must be {words}.")


def check_choices(cfg: Config) -> None:
    for key, choices in CHOICES.items():
        if not _has(cfg, key) or _get(cfg, key) in choices:
            continue
        words = ", ".join("null" if choice is None else choice for choice in choices)
        raise ValueError(f"{key}={_get(cfg, key)} is not known: choose one of {words}.")


def check_world_size(cfg: Config) -> None:
    world_size = cfg.trainer.devices * cfg.trainer.num_nodes
    tensor, pipeline = cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size
    if world_size % (tensor * pipeline):
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} times trainer.num_nodes={cfg.trainer.num_nodes} gives {world_size} "
            f"processes, which model.tensor_model_parallel_size={tensor} times "
            f"model.pipeline_model_parallel_size={pipeline} does not divide: change one of the four."
        )


def check_sequence_parallel(cfg: PPOConfig | SFTConfig) -> None:
    if cfg.model.sequence_parallel and cfg.model.tensor_model_parallel_size == 1:
        raise ValueError(
            "model.sequence_parallel=true splits work over tensor-parallel ranks, but "
            "model.tensor_model_parallel_size=1: turn it off or raise that size."
        )


def check_batch_size(cfg: PPOConfig | SFTConfig) -> None:
    """What one optimizer step consumes is cut evenly over data-parallel ranks and microbatches."""
    key = "ppo.minibatch_size" if isinstance(cfg, PPOConfig) else "model.global_batch_size"
    size, micro, data_parallel = _get(cfg, key), cfg.model.micro_batch_size, data_parallel_size(cfg)
    if size % (micro * data_parallel):
        raise ValueError(
            f"{key}={size} is not divisible by model.micro_batch_size={micro} times {data_parallel} data-parallel "
            f"ranks: make it a multiple of {micro * data_parallel}."
        )


def check_rollout_batch(cfg: PPOConfig) -> None:
    """One step's samples are cut evenly into minibatches, and over data-parallel ranks."""
    samples = cfg.ppo.num_prompts * cfg.ppo.samples_per_prompt
    words = f"ppo.num_prompts={cfg.ppo.num_prompts} times ppo.samples_per_prompt={cfg.ppo.samples_per_prompt}"
    if samples % cfg.ppo.minibatch_size:
        raise ValueError(
            f"{words} gives {samples} samples per step, which ppo.minibatch_size={cfg.ppo.minibatch_size} does not "
            "divide: change one of the three."
        )
    if samples % data_parallel_size(cfg):
        raise ValueError(
            f"{words} gives {samples} samples per step, which {data_parallel_size(cfg)} data-parallel ranks cannot "
            "share evenly: make it a multiple of that."
        )


def check_betas(cfg: PPOConfig | SFTConfig) -> None:
    for key in ("model.optim.betas", "model.critic.optim.betas"):
        betas = _get(cfg, key)
        if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"{key}={betas} must be two numbers, each at least 0 and below 1, as [0.9,0.95].")


def check_schedules(cfg: PPOConfig | SFTConfig) -> None:
    for key in ("model.optim", "model.critic.optim"):
        optim = _get(cfg, key)
        if optim is not None and optim.sched.min_lr > optim.lr:
            raise ValueError(
                f"{key}.sched.min_lr={optim.sched.min_lr} is above the peak, {key}.lr={optim.lr}: lower it."
            )


def check_monitor(cfg: PPOConfig | SFTConfig) -> None:
    monitor = cfg.exp_manager.checkpoint_callback_params.monitor
    if not monitor.startswith("val/"):
        raise ValueError(
            f"exp_manager.checkpoint_callback_params.monitor={monitor} is not a validation metric: name one that "
            "begins with val/, such as val/reward."
        )


def check_offload(cfg: PPOConfig) -> None:
    for name in cfg.ppo.offload:
        if name not in OFFLOADABLE:
            raise ValueError(f"ppo.offload holds {name!r}: it may hold {', '.join(OFFLOADABLE)}.")


def check_reward_function(cfg: PPOConfig) -> None:
    function = cfg.reward.function
    if function is not None and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", function):
        raise ValueError(
            f"reward.function={function} does not name a Python function: write package.module:name, such as "
            "my_package.rewards:score."
        )


def check_sampling(cfg: Config) -> None:
    """Types and ranges of sampling keys, whose lists are sweeps: at most one in all, only where validation exists."""
    if isinstance(cfg, SFTConfig):
        return
    swept = [key for key in _sampling_keys(cfg) if isinstance(_get(cfg, key), list)]
    if isinstance(cfg, GenerateConfig) and swept:
        raise ValueError(f"{swept[0]}={_get(cfg, swept[0])} is a list, which only validation in training can use.")
    if len(swept) > 1:
        raise ValueError(f"{' and '.join(swept)} are lists, but only one sampling key may be swept at a time.")
    for key in _sampling_keys(cfg):
        value, name = _get(cfg, key), key.rpartition(".")[2]
        if value is None and ".validation." in key:
            continue
        if value == []:
            raise ValueError(f"{key}=[] is empty: give one value, or a list of values to sweep in validation.")
        for item in value if isinstance(value, list) else [value]:
            words, holds = _SAMPLING_RANGES[name]
            if not _is_number(item, SWEEPABLE[name]) or not holds(item):
                kind = "an integer" if SWEEPABLE[name] is int else "a number"
                raise ValueError(f"{key}={value} is not valid: it must be {kind}, {words}.")
    if isinstance(cfg, PPOConfig) and swept and swept[0].endswith((".top_k", ".top_p", ".seed")):
        _check_sweep_samples(cfg, swept[0])


def check_rollout_temperature(cfg: PPOConfig) -> None:
    if sampling_sweep(cfg.generation)[0]["temperature"] == 0:
        raise ValueError(
            f"generation.temperature={cfg.generation.temperature} makes rollouts greedy, and PPO cannot learn from "
            "them: set it above 0 (validation has its own, generation.validation.temperature)."
        )


def warn_truncated_rollouts(cfg: PPOConfig) -> None:
    rollout = sampling_sweep(cfg.generation)[0]
    if rollout["top_k"] > 0 or rollout["top_p"] < 1:
        warnings.warn(
            f"generation.top_k={rollout['top_k']} and generation.top_p={rollout['top_p']} cut the distribution that "
            "rollouts are drawn from, while log-probabilities are those of the whole tempered distribution: PPO's "
            "ratios are then slightly off.",
            stacklevel=2,
        )


def _check_sweep_samples(cfg: PPOConfig, key: str) -> None:
    if sampling_sweep(cfg.generation)[1][0][1]["temperature"] == 0:
        raise ValueError(
            f"{key}={_get(cfg, key)} sweeps a key that greedy validation does not use: set "
            "generation.validation.temperature=null to sample as rollouts do."
        )


def _sampling_keys(cfg: Config) -> list[str]:
    sections = ("generation", "generation.validation") if isinstance(cfg, PPOConfig) else ("generation",)
    return [f"{section}.{key}" for section in sections for key in SWEEPABLE]


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)


def _parent(node: DictConfig, key: str) -> tuple[DictConfig, str]:
    section, _, name = key.rpartition(".")
    return (OmegaConf.select(node, section) if section else node), name


def _has(cfg: Any, key: str) -> bool:
    for name in key.split("."):
        if not hasattr(cfg, name):
            return False
        cfg = getattr(cfg, name)
    return True


def _get(cfg: Any, key: str) -> Any:
    """The value of a dotted key, None where this command has no such key."""
    for name in key.split("."):
        cfg = getattr(cfg, name, None)
    return cfg
