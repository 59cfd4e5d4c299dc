"""The commands that have a configuration, and the keys that each of them cannot do without."""

from __future__ import annotations

from nemo_rlhf.config.data import DataCommandConfig
from nemo_rlhf.config.plan import PlanConfig
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
from nemo_rlhf.config.slurm import SlurmConfig

COMMANDS: dict[str, type[Config] | type[DataCommandConfig] | type[PlanConfig] | type[SlurmConfig]] = {
    "ppo": PPOConfig,
    "sft": SFTConfig,
    "ilql": ILQLConfig,
    "rft": RFTConfig,
    "reward": RewardModelConfig,
    "generate": GenerateConfig,
    "serve-reward": ServeRewardConfig,
    "data": DataCommandConfig,
    "plan": PlanConfig,
    "slurm": SlurmConfig,
}

# What may be given in the place of a required key.
ALTERNATIVES = {
    "reward.function": ("reward.sources", "environment.function"),
    "data.prompts": ("environment.function",),
}

# Keys without a default, in each command, and a value to show to whoever forgot one.
REQUIRED: dict[str, dict[str, str]] = {
    "ppo": {
        "model.restore_from": "/models/llama-sft",
        "exp_manager.explicit_log_dir": "runs/ppo",
        "data.prompts": "prompts.jsonl",
        "reward.function": "my_package.rewards:score",
    },
    "rft": {
        "model.restore_from": "/models/llama-sft",
        "exp_manager.explicit_log_dir": "runs/rft",
        "data.prompts": "prompts.jsonl",
        "reward.function": "my_package.rewards:score",
    },
    "reward": {
        "model.restore_from": "/models/llama-sft",
        "exp_manager.explicit_log_dir": "runs/reward",
        "data.train": "pairs.jsonl",
    },
    "ilql": {
        "model.restore_from": "/models/llama-sft",
        "exp_manager.explicit_log_dir": "runs/ilql",
        "data.train": "dialogues.jsonl",
    },
    "sft": {
        "model.restore_from": "/models/llama",
        "exp_manager.explicit_log_dir": "runs/sft",
        "data.train": "train.jsonl",
    },
    "generate": {
        "model.restore_from": "/models/llama",
        "data.prompts": "prompts.jsonl",
        "out": "responses.jsonl",
    },
    "data": {},
    "plan": {
        "plan.model": "llama3-8b",
    },
    "slurm": {},
    "serve-reward": {
        "model.restore_from": "runs/reward/checkpoints/best",
    },
}
