"""What the keys of PPO must obey between them: how advantages are estimated, what is cut off, what is offloaded."""

from __future__ import annotations

from nemo_rlhf.config.schema import PPOAlgorithmConfig, PPOConfig

OFFLOADABLE = ("optimizer", "critic", "reference")


def check_advantage(cfg: PPOConfig) -> None:
    """Advantages against a prompt's other samples need some, and have no use for a critic."""
    ppo = cfg.ppo
    if ppo.advantage == "gae":
        return
    if ppo.samples_per_prompt < 2:
        raise ValueError(
            f"ppo.advantage={ppo.advantage} compares the samples of a prompt, but "
            f"ppo.samples_per_prompt={ppo.samples_per_prompt}: raise it to 2 or more."
        )
    critics_own = {
        "model.critic.restore_from": (cfg.model.critic.restore_from, None),
        "ppo.critic_warmup_steps": (ppo.critic_warmup_steps, 0),
        "ppo.gamma": (ppo.gamma, 1.0),
    }
    for key, (value, unset) in critics_own.items():
        if value != unset:
            raise ValueError(
                f"{key}={value} is for a critic, and ppo.advantage={ppo.advantage} has none: leave it out, or choose "
                "ppo.advantage=gae."
            )
    if "critic" in ppo.offload:
        raise ValueError(
            f"ppo.offload holds critic, and ppo.advantage={ppo.advantage} has none: leave it out of the list."
        )


def check_unused(cfg: PPOConfig) -> None:
    """A key that is set and changes nothing is a misunderstanding."""
    ppo, unset = cfg.ppo, PPOAlgorithmConfig()
    if ppo.advantage != "grpo" and ppo.scale_by_std != unset.scale_by_std:
        raise ValueError(
            f"ppo.scale_by_std is for ppo.advantage=grpo, and it is {ppo.advantage}: leave the former out."
        )
    if ppo.on_truncation != "penalise" and ppo.truncation_penalty != unset.truncation_penalty:
        raise ValueError(
            f"ppo.truncation_penalty={ppo.truncation_penalty} is for ppo.on_truncation=penalise, and it is "
            f"{ppo.on_truncation}: set the latter, or leave the former out."
        )


def check_truncation(cfg: PPOConfig) -> None:
    if cfg.ppo.on_truncation != "keep" and cfg.generation.ignore_eos:
        raise ValueError(
            f"ppo.on_truncation={cfg.ppo.on_truncation} is for responses that were cut, and generation.ignore_eos=true "
            "cuts all of them: turn one of the two off."
        )


def check_keep_graph(cfg: PPOConfig, data_parallel_size: int) -> None:
    """The graph of one microbatch is kept, and only where the whole model is."""
    if not cfg.ppo.keep_graph:
        return
    model, samples = cfg.model, cfg.model.micro_batch_size * data_parallel_size
    reason = ""
    if model.pipeline_model_parallel_size > 1:
        reason = f"model.pipeline_model_parallel_size={model.pipeline_model_parallel_size} splits it"
    elif cfg.ppo.minibatch_size > samples:
        reason = f"ppo.minibatch_size={cfg.ppo.minibatch_size} is more than the {samples} samples of one microbatch"
    elif "critic" in cfg.ppo.offload:
        reason = "ppo.offload holds critic"
    if reason:
        raise ValueError(
            f"ppo.keep_graph=true keeps the forward pass of a minibatch from its evaluation until it is learned from, "
            f"and {reason}: change the latter, or leave ppo.keep_graph out."
        )


def check_offload(cfg: PPOConfig) -> None:
    for name in cfg.ppo.offload:
        if name not in OFFLOADABLE:
            raise ValueError(f"ppo.offload holds {name!r}: it may hold {', '.join(OFFLOADABLE)}.")
