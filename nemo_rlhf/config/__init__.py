"""Typed configuration: the schema, its rules, and how files and overrides become one object. Imports no torch.

The module can be called: ``nemo_rlhf.config("ppo", overrides=[...])`` is ``load("ppo", [...])``, whether or not this
module was imported before, since importing it sets the attribute ``config`` of the package to the module.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rlhf.config.dumping import dump
from nemo_rlhf.config.load import config_directory, load
from nemo_rlhf.config.overrides import quoted
from nemo_rlhf.config.sampling import sampling_sweep, sampling_values
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
from nemo_rlhf.config.validate import data_parallel_size, validate

__all__ = [
    "Config",
    "GenerateConfig",
    "ILQLConfig",
    "PPOConfig",
    "RFTConfig",
    "RewardModelConfig",
    "SFTConfig",
    "ServeRewardConfig",
    "config_directory",
    "data_parallel_size",
    "dump",
    "load",
    "quoted",
    "sampling_sweep",
    "sampling_values",
    "validate",
]


# What ``nemo_rlhf.train`` and ``play`` have in memory, so that a configuration for it may leave these keys out.
TRAIN_SUPPLIES: dict[str, tuple[str, ...]] = {
    "ppo": ("data.prompts", "reward.function"),
    "sft": ("data.train",),
    "ilql": ("data.train",),
    "rft": ("data.prompts", "reward.function"),
    "generate": ("data.prompts", "out"),
}


class _CallableModule(types.ModuleType):
    def __call__(self, command: str, overrides: Sequence[str] = (), *, config_file: str | Path | None = None) -> Any:
        """The configuration of ``command`` for ``nemo_rlhf.train``, or of "generate" for ``play``: they bring model,
        data and reward themselves."""
        given = {override.split("=", 1)[0] for override in overrides}
        supplied = [key for key in TRAIN_SUPPLIES.get(command, ()) if key not in given]
        return load(command, ["model.restore_from=''", *overrides], config_file=config_file, supplied=supplied)


sys.modules[__name__].__class__ = _CallableModule
