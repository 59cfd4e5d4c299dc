"""Keys of PPO in an environment of several turns, and what they must obey. No torch is imported here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_rlhf.config.rules import FUNCTION_NAME

if TYPE_CHECKING:
    from nemo_rlhf.config.schema import PPOConfig


@dataclass
class EnvironmentConfig:
    """In the place of prompts and rewards: the policy acts in environments, which reward it."""

    function: str | None = None  # "package.module:name": number of an episode -> its environment; null: prompts
    max_turns: int | None = None  # of the policy in an episode; null: as many as the environment wants
    max_sequence_length: int = 2048  # tokens of an episode
    validation_episodes: int = 0  # episodes 0, 1, ... are for validation, and training begins behind them


def check_given_environment(cfg: PPOConfig) -> None:
    """What is set in vain where an environment is given in Python."""
    names = {
        "environment.function": cfg.environment.function,
        "data.prompts": cfg.data.prompts,
        "reward.function": cfg.reward.function,
        "reward.sources": cfg.reward.sources,
    }
    for key, value in names.items():
        if value:
            raise ValueError(f"{key} is set in the configuration, and env is given in Python: keep one of them.")
    _check_episodes(cfg)


def check_environment(cfg: PPOConfig) -> None:
    env = cfg.environment
    if env.function is None:
        return
    if not re.fullmatch(FUNCTION_NAME, env.function):
        raise ValueError(
            f"environment.function={env.function} does not name a Python function: write package.module:name, such as "
            "my_package.games:make."
        )
    _check_episodes(cfg)


def _check_episodes(cfg: PPOConfig) -> None:
    env = cfg.environment
    if cfg.data.validation_prompts is not None:
        raise ValueError(
            f"data.validation_prompts={cfg.data.validation_prompts} has no use beside environments: leave it out, and "
            "set environment.validation_episodes."
        )
    if env.max_sequence_length <= cfg.generation.max_new_tokens:
        raise ValueError(
            f"environment.max_sequence_length={env.max_sequence_length} has no room for a first turn of "
            f"generation.max_new_tokens={cfg.generation.max_new_tokens}: raise the former or lower the latter."
        )
