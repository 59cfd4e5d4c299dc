"""What the sampling keys of a configuration must obey: in rollouts, in validation, and in sweeps of it."""

from __future__ import annotations

import warnings
from typing import Any

from nemo_rlhf.config.rules import COUNT, NOT_NEGATIVE, Rule, value_of
from nemo_rlhf.config.sampling import SWEEPABLE, sampling_sweep
from nemo_rlhf.config.schema import (
    Config,
    GenerateConfig,
    ILQLConfig,
    PPOConfig,
    RewardModelConfig,
    RFTConfig,
    ServeRewardConfig,
    SFTConfig,
)

_SAMPLING_RANGES: dict[str, Rule] = {
    "max_new_tokens": COUNT,
    "temperature": NOT_NEGATIVE,
    "top_k": NOT_NEGATIVE,
    "top_p": ("greater than 0 and at most 1", lambda x: 0 < x <= 1),
    "seed": NOT_NEGATIVE,
    "beta": NOT_NEGATIVE,
}


def check_sampling(cfg: Config) -> None:
    """Types and ranges of sampling keys, whose lists are sweeps: at most one in all, only where validation exists."""
    if isinstance(cfg, SFTConfig | RewardModelConfig | ServeRewardConfig):
        return
    swept = [key for key in _sampling_keys(cfg) if isinstance(value_of(cfg, key), list)]
    if isinstance(cfg, GenerateConfig) and swept:
        raise ValueError(f"{swept[0]}={value_of(cfg, swept[0])} is a list, which only validation in training can use.")
    if len(swept) > 1:
        raise ValueError(f"{' and '.join(swept)} are lists, but only one sampling key may be swept at a time.")
    for key in _sampling_keys(cfg):
        value, name = value_of(cfg, key), key.rpartition(".")[2]
        if value is None and ".validation." in key:
            continue
        if value == []:
            raise ValueError(f"{key}=[] is empty: give one value, or a list of values to sweep in validation.")
        for item in value if isinstance(value, list) else [value]:
            words, holds = _SAMPLING_RANGES[name]
            if not _is_number(item, SWEEPABLE[name]) or not holds(item):
                kind = "an integer" if SWEEPABLE[name] is int else "a number"
                raise ValueError(f"{key}={value} is not valid: it must be {kind}, {words}.")
    if not isinstance(cfg, GenerateConfig) and swept and swept[0].endswith((".top_k", ".top_p", ".seed")):
        _check_sweep_samples(cfg, swept[0])


def check_rollout_temperature(cfg: PPOConfig | RFTConfig) -> None:
    if sampling_sweep(cfg.generation)[0]["temperature"] == 0:
        raise ValueError(
            f"generation.temperature={cfg.generation.temperature} makes rollouts greedy, which teaches "
            "nothing: set it above 0 (validation has its own, generation.validation.temperature)."
        )


def check_unguided(cfg: PPOConfig | RFTConfig) -> None:
    for key in ("generation.beta", "generation.validation.beta"):
        if value_of(cfg, key):
            raise ValueError(f"{key}={value_of(cfg, key)} guides by Q values, which this policy has not: leave it 0.")


def warn_truncated_rollouts(cfg: PPOConfig) -> None:
    rollout = sampling_sweep(cfg.generation)[0]
    if rollout["top_k"] > 0 or rollout["top_p"] < 1:
        warnings.warn(
            f"generation.top_k={rollout['top_k']} and generation.top_p={rollout['top_p']} cut the distribution that "
            "rollouts are drawn from, while log-probabilities are those of the whole tempered distribution: PPO's "
            "ratios are then slightly off.",
            stacklevel=2,
        )


def _check_sweep_samples(cfg: PPOConfig | ILQLConfig | RFTConfig, key: str) -> None:
    if sampling_sweep(cfg.generation)[1][0][1]["temperature"] == 0:
        raise ValueError(
            f"{key}={value_of(cfg, key)} sweeps a key that greedy validation does not use: set "
            "generation.validation.temperature=null to sample as rollouts do."
        )


def _sampling_keys(cfg: Config) -> list[str]:
    sections = ("generation",) if isinstance(cfg, GenerateConfig) else ("generation", "generation.validation")
    return [f"{section}.{key}" for section in sections for key in SWEEPABLE]


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
