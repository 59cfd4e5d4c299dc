"""What a configuration must obey beyond its types: ranges of single keys, and rules between keys.

Each rule is a small function that raises ValueError with one sentence: the keys, their values, what to change.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from omegaconf import DictConfig, OmegaConf

from nemo_rlhf.config.changes import check_allow_changes
from nemo_rlhf.config.commands import ALTERNATIVES, REQUIRED
from nemo_rlhf.config.data import DataCommandConfig
from nemo_rlhf.config.environment import check_environment
from nemo_rlhf.config.plan import PlanConfig, check_plan
from nemo_rlhf.config.rules import (
    COUNT,
    FRACTION,
    FUNCTION_NAME,
    INFINITY,
    NOT_NEGATIVE,
    POSITIVE,
    Rule,
    has_key,
    value_of,
)
from nemo_rlhf.config.schema import (
    Config,
    GenerateConfig,
    ILQLConfig,
    PPOConfig,
    RFTConfig,
    ServeRewardConfig,
    TrainingConfig,
)
from nemo_rlhf.config.server import check_server
from nemo_rlhf.config.slurm import SlurmConfig, check_slurm
from nemo_rlhf.config.sources import check_reward
from nemo_rlhf.config.validate_ilql import check_ilql_validation, check_value_trunk
from nemo_rlhf.config.validate_people import FEEDBACK_RANGES, check_feedback
from nemo_rlhf.config.validate_ppo import (
    check_advantage,
    check_keep_graph,
    check_offload,
    check_truncation,
    check_unused,
)
from nemo_rlhf.config.validate_sampling import (
    check_rollout_temperature,
    check_sampling,
    check_unguided,
    warn_truncated_rollouts,
)

_OPTIM_RANGES: dict[str, Rule] = {
    "lr": POSITIVE,
    "eps": POSITIVE,
    "weight_decay": NOT_NEGATIVE,
    "clip_grad": NOT_NEGATIVE,
    "sched.warmup_steps": NOT_NEGATIVE,
    "sched.min_lr": NOT_NEGATIVE,
}

# Ranges of single keys; null passes where the schema allows it.
RANGES: dict[str, Rule] = {
    "seed": NOT_NEGATIVE,
    "trainer.devices": COUNT,
    "trainer.num_nodes": COUNT,
    "trainer.timeout_s": COUNT,
    "trainer.heartbeat_timeout_s": COUNT,
    "trainer.max_steps": COUNT,
    "trainer.max_epochs": COUNT,
    "trainer.val_check_interval": NOT_NEGATIVE,
    "trainer.log_every_n_steps": COUNT,
    "exp_manager.checkpoint_callback_params.every_n_train_steps": COUNT,
    "exp_manager.checkpoint_callback_params.save_last_k": COUNT,
    "exp_manager.checkpoint_callback_params.save_top_k": NOT_NEGATIVE,
    "model.tensor_model_parallel_size": COUNT,
    "model.pipeline_model_parallel_size": COUNT,
    "model.expert_model_parallel_size": COUNT,
    "model.micro_batch_size": COUNT,
    "model.global_batch_size": COUNT,
    **{f"model.optim.{key}": rule for key, rule in _OPTIM_RANGES.items()},
    **{f"model.critic.optim.{key}": rule for key, rule in _OPTIM_RANGES.items()},
    **{f"ppo.feedback.optim.{key}": rule for key, rule in _OPTIM_RANGES.items()},
    **FEEDBACK_RANGES,
    "ppo.num_prompts": COUNT,
    "ppo.samples_per_prompt": COUNT,
    "ppo.epochs": COUNT,
    "ppo.minibatch_size": COUNT,
    "ppo.gamma": FRACTION,
    "ppo.lam": FRACTION,
    "ppo.clip_low": ("greater than 0 and at most 1", lambda x: 0 < x <= 1),
    "ppo.clip_high": POSITIVE,
    "ppo.dual_clip": ("greater than 1 or null", lambda x: 1 < x < INFINITY),
    "ppo.value_clip": POSITIVE,
    "ppo.entropy_coef": NOT_NEGATIVE,
    "ppo.kl.coef": NOT_NEGATIVE,
    "ppo.kl.target": ("greater than 0 or null", lambda x: 0 < x < INFINITY),
    "ppo.kl.horizon": COUNT,
    "ppo.reward_clip": ("greater than 0 or null", lambda x: 0 < x < INFINITY),
    "ppo.target_kl": ("greater than 0 or null", lambda x: 0 < x < INFINITY),
    "ppo.critic_warmup_steps": NOT_NEGATIVE,
    "ppo.truncation_penalty": POSITIVE,
    "ppo.show_samples_every": NOT_NEGATIVE,
    "ppo.keep_rollouts": COUNT,
    "ilql.tau": FRACTION,
    "ilql.gamma": FRACTION,
    "ilql.beta": NOT_NEGATIVE,
    "ilql.alpha": ("greater than 0 and at most 1", lambda x: 0 < x <= 1),
    "ilql.cql_scale": NOT_NEGATIVE,
    "ilql.awac_scale": NOT_NEGATIVE,
    "ilql.steps_for_target_q_sync": COUNT,
    "ilql.head_width": COUNT,
    "ilql.num_layers_unfrozen": ("-1 or more", lambda x: x >= -1),
    "rft.num_prompts": COUNT,
    "rft.samples_per_prompt": COUNT,
    "rft.improve_steps": COUNT,
    "rft.start_percentile": FRACTION,
    "rft.end_percentile": FRACTION,
    "rft.keep_rollouts": COUNT,
    "environment.max_turns": COUNT,
    "environment.validation_episodes": NOT_NEGATIVE,
    "generation.num_slots": COUNT,
    "server.port": ("between 0 and 65535", lambda x: 0 <= x <= 65535),
    "server.batch_size": COUNT,
    "server.max_body_mib": COUNT,
    "generation.adv_clip": ("greater than 0 or null", lambda x: 0 < x < INFINITY),
    "data.max_prompt_length": COUNT,
    "data.top_percent": ("greater than 0 and at most 100", lambda x: 0 < x <= 100),
    "data.max_sequence_length": ("2 or more", lambda x: x >= 2),
}

_SCHEDULES = ("constant", "cosine", "linear")
_OPTIMS = ("model.optim", "model.critic.optim", "ppo.feedback.optim")

# Keys that take one of a few words; None stands for null.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "trainer.precision": ("32", "bf16"),
    "trainer.matmul_precision": ("highest", "high"),
    "exp_manager.checkpoint_callback_params.mode": ("max", "min"),
    "model.init": ("pretrained", "random"),
    "model.layer_spec": ("auto", "transformer_engine", "local"),
    "model.activations_checkpoint_granularity": (None, "selective", "full"),
    "model.optim.sched.name": _SCHEDULES,
    "model.critic.optim.sched.name": _SCHEDULES,
    "ppo.feedback.optim.sched.name": _SCHEDULES,
    "ppo.feedback.select": ("uncertainty", "random"),
    "ppo.advantage": ("gae", "rloo", "grpo"),
    "ppo.on_truncation": ("keep", "mask", "penalise"),
    "ppo.kl.estimator": ("k1", "k2", "k3", "abs"),
    "ppo.reward_scaling": ("none", "running", "reference"),
    "ppo.reference": ("resident", "swap"),
    "ilql.target": ("td", "mc"),
    "reward_model.loss": ("bradley_terry", "regression"),
    "data.train_on": ("response", "all"),
    "data.too_long": ("truncate", "refuse"),
    "data.on_error": ("stop", "skip"),
    "data.empty_turns": ("refuse", "drop"),
}


def require_keys(node: DictConfig, command: str, supplied: Collection[str] = ()) -> None:
    """Raises ValueError that shows how to set the required keys that ``node`` lacks; ``supplied`` are those that
    the caller has in memory instead, and they must not be set as well."""
    examples = REQUIRED[command]
    unset = [key for key in examples if not _is_set(node, key)]
    alternatives = {
        key: [name for name in others if OmegaConf.select(node, name.partition(".")[0]) is not None]
        for key, others in ALTERNATIVES.items()
        if key in examples
    }
    for key, others in alternatives.items():
        given = [name for name in (key, *others) if _is_set(node, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are both set: keep one of them.")
        unset = [name for name in unset if name != key or not given]
    missing = [key for key in examples if key in unset and key not in supplied]
    if missing:
        example = " ".join(f"{key}={examples[key]}" for key in missing)
        verb = "is" if len(missing) == 1 else "are"
        instead = "".join(
            f" (or {' or '.join(others)} in place of {key})"
            for key, others in alternatives.items()
            if key in missing and others
        )
        raise ValueError(
            f"{' and '.join(missing)} {verb} not set: add it to your yaml file or say, e.g., {example}{instead}."
        )
    for key in supplied:
        if OmegaConf.select(node, key, throw_on_missing=False) is not None:
            raise ValueError(f"{key} is set in the configuration and given in Python too: keep one of them.")


def validate(cfg: Config | DataCommandConfig | PlanConfig | SlurmConfig) -> None:
    """Raises ValueError for the first rule that ``cfg`` breaks; warns of what is allowed but rarely meant."""
    if isinstance(cfg, PlanConfig):
        check_plan(cfg)
        return
    if isinstance(cfg, SlurmConfig):
        check_slurm(cfg)
        return
    check_ranges(cfg)
    check_choices(cfg)
    if isinstance(cfg, DataCommandConfig):
        return
    check_sampling(cfg)
    check_world_size(cfg)
    check_expert_parallel(cfg)
    if isinstance(cfg, ServeRewardConfig):
        check_server(cfg.server)
    if isinstance(cfg, GenerateConfig | ServeRewardConfig):
        return
    check_sequence_parallel(cfg)
    check_betas(cfg)
    check_schedules(cfg)
    check_monitor(cfg)
    check_allow_changes(cfg)
    check_batch_size(cfg)
    if isinstance(cfg, ILQLConfig):
        check_reward_function(cfg)
        check_ilql_validation(cfg)
        check_value_trunk(cfg)
    if isinstance(cfg, PPOConfig | RFTConfig):
        check_rollout_temperature(cfg)
        check_unguided(cfg)
        check_reward_function(cfg)
        check_reward(cfg)
    if isinstance(cfg, RFTConfig):
        check_percentiles(cfg)
    if isinstance(cfg, PPOConfig):
        check_environment(cfg)
        check_feedback(cfg, data_parallel_size(cfg))
        check_rollout_batch(cfg)
        check_offload(cfg)
        check_keep_graph(cfg, data_parallel_size(cfg))
        check_advantage(cfg)
        check_truncation(cfg)
        check_unused(cfg)
        warn_truncated_rollouts(cfg)


def data_parallel_size(cfg: Config) -> int:
    """Data-parallel ranks of the whole job."""
    model = cfg.model
    world_size = cfg.trainer.devices * cfg.trainer.num_nodes
    return world_size // (model.tensor_model_parallel_size * model.pipeline_model_parallel_size)


def check_ranges(cfg: Config | DataCommandConfig) -> None:
    for key, (words, holds) in RANGES.items():
        value = value_of(cfg, key)
        if value is not None and not holds(value):
            raise ValueError(f"{key}={value} is out of range: it must be {words}.")


def check_choices(cfg: Config | DataCommandConfig) -> None:
    for key, choices in CHOICES.items():
        if not has_key(cfg, key) or value_of(cfg, key) in choices:
            continue
        words = ", ".join("null" if choice is None else choice for choice in choices)
        raise ValueError(f"{key}={value_of(cfg, key)} is not known: choose one of {words}.")


def check_world_size(cfg: Config) -> None:
    world_size = cfg.trainer.devices * cfg.trainer.num_nodes
    tensor, pipeline = cfg.model.tensor_model_parallel_size, cfg.model.pipeline_model_parallel_size
    if world_size % (tensor * pipeline):
        raise ValueError(
            f"trainer.devices={cfg.trainer.devices} times trainer.num_nodes={cfg.trainer.num_nodes} gives {world_size} "
            f"processes, which model.tensor_model_parallel_size={tensor} times "
            f"model.pipeline_model_parallel_size={pipeline} does not divide: change one of the four."
        )


def check_expert_parallel(cfg: Config) -> None:
    """Experts are shared by a part of the tensor-parallel ranks of a replica, or by the ranks of several replicas."""
    expert, tensor = cfg.model.expert_model_parallel_size, cfg.model.tensor_model_parallel_size
    ranks = tensor * data_parallel_size(cfg)
    if ranks % expert or (tensor % expert and expert % tensor):
        raise ValueError(
            f"model.expert_model_parallel_size={expert} must divide the {ranks} tensor- and data-parallel processes of "
            f"a pipeline stage, and divide model.tensor_model_parallel_size={tensor} or be a multiple of it."
        )


def check_sequence_parallel(cfg: TrainingConfig) -> None:
    if cfg.model.sequence_parallel and cfg.model.tensor_model_parallel_size == 1:
        raise ValueError(
            "model.sequence_parallel=true splits work over tensor-parallel ranks, but "
            "model.tensor_model_parallel_size=1: turn it off or raise that size."
        )


def check_batch_size(cfg: TrainingConfig) -> None:
    """What one optimizer step consumes is cut evenly over data-parallel ranks and microbatches."""
    key = "ppo.minibatch_size" if isinstance(cfg, PPOConfig) else "model.global_batch_size"
    size, micro, data_parallel = value_of(cfg, key), cfg.model.micro_batch_size, data_parallel_size(cfg)
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


def check_betas(cfg: TrainingConfig) -> None:
    for key in (f"{optim}.betas" for optim in _OPTIMS):
        betas = value_of(cfg, key)
        if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"{key}={betas} must be two numbers, each at least 0 and below 1, as [0.9,0.95].")


def check_schedules(cfg: TrainingConfig) -> None:
    for key in _OPTIMS:
        optim = value_of(cfg, key)
        if optim is not None and optim.sched.min_lr > optim.lr:
            raise ValueError(
                f"{key}.sched.min_lr={optim.sched.min_lr} is above the peak, {key}.lr={optim.lr}: lower it."
            )


def check_monitor(cfg: TrainingConfig) -> None:
    monitor = cfg.exp_manager.checkpoint_callback_params.monitor
    if not monitor.startswith("val/"):
        raise ValueError(
            f"exp_manager.checkpoint_callback_params.monitor={monitor} is not a validation metric: name one that "
            "begins with val/, such as val/reward."
        )


def check_percentiles(cfg: RFTConfig) -> None:
    start, end = cfg.rft.start_percentile, cfg.rft.end_percentile
    if start > end:
        raise ValueError(
            f"rft.start_percentile={start} is above rft.end_percentile={end}: the percentile rises, lower the former."
        )


def check_reward_function(cfg: PPOConfig | ILQLConfig | RFTConfig) -> None:
    function = cfg.reward.function
    if function is not None and not re.fullmatch(FUNCTION_NAME, function):
        raise ValueError(
            f"reward.function={function} does not name a Python function: write package.module:name, such as "
            "my_package.rewards:score."
        )


def _is_set(node: DictConfig, key: str) -> bool:
    return not OmegaConf.is_missing(*_parent(node, key)) and OmegaConf.select(node, key) not in (None, [])


def _parent(node: DictConfig, key: str) -> tuple[DictConfig, str]:
    section, _, name = key.rpartition(".")
    return (OmegaConf.select(node, section) if section else node), name
