"""What the keys of ``ppo.feedback`` must obey between them and beside others."""

from __future__ import annotations

from nemo_rlhf.config.people import FeedbackConfig
from nemo_rlhf.config.rules import COUNT, FRACTION, INFINITY, NOT_NEGATIVE, POSITIVE, Rule
from nemo_rlhf.config.schema import PPOConfig
from nemo_rlhf.config.sources import ModelSourceConfig, read_sources

FEEDBACK_RANGES: dict[str, Rule] = {
    "ppo.feedback.every_n_steps": COUNT,
    "ppo.feedback.num_pairs": COUNT,
    "ppo.feedback.candidates": COUNT,
    "ppo.feedback.held_out": ("between 0 and 1, neither included", lambda x: 0 < x < 1),
    "ppo.feedback.min_new": COUNT,
    "ppo.feedback.min_held_out": COUNT,
    "ppo.feedback.refresh_steps": COUNT,
    "ppo.feedback.batch_size": COUNT,
    "ppo.feedback.replay": FRACTION,
    "ppo.feedback.wait_for": NOT_NEGATIVE,
    "ppo.feedback.wait_timeout_s": POSITIVE,
    "ppo.feedback.answers_wanted": COUNT,
    "ppo.feedback.undo_s": ("0 or more", lambda x: 0 <= x < INFINITY),
}


def check_feedback(cfg: PPOConfig, replicas: int) -> None:
    feedback = cfg.ppo.feedback
    if feedback.store is None:
        if feedback != FeedbackConfig():
            raise ValueError(
                "ppo.feedback is set without ppo.feedback.store: name the preference store, or leave it out."
            )
        return
    if cfg.environment.function is not None:
        raise ValueError(
            "ppo.feedback.store is set beside environment.function: people compare answers to prompts, not episodes; "
            "leave one of the two out."
        )
    learning_source(cfg)
    if feedback.batch_size % replicas:
        raise ValueError(
            f"ppo.feedback.batch_size={feedback.batch_size} cannot be shared evenly by {replicas} data-parallel ranks: "
            "make it a multiple of that."
        )
    if num_replayed(feedback) >= feedback.batch_size:
        raise ValueError(
            f"ppo.feedback.replay={feedback.replay:g} leaves no new comparison in a batch of "
            f"ppo.feedback.batch_size={feedback.batch_size}: lower it."
        )
    if feedback.wait_for > feedback.num_pairs * feedback.answers_wanted:
        raise ValueError(
            f"ppo.feedback.wait_for={feedback.wait_for} is more than a round can have answers, which are "
            f"ppo.feedback.num_pairs={feedback.num_pairs} times ppo.feedback.answers_wanted="
            f"{feedback.answers_wanted}: lower it, or raise one of these."
        )
    if feedback.wait_for and feedback.wait_timeout_s >= cfg.trainer.timeout_s:
        raise ValueError(
            f"ppo.feedback.wait_timeout_s={feedback.wait_timeout_s:g} must be below "
            f"trainer.timeout_s={cfg.trainer.timeout_s}, after which the other ranks give up: lower the former."
        )


def num_replayed(feedback: FeedbackConfig) -> int:
    """Comparisons of a batch that earlier refreshes have seen, once there are any."""
    return round(feedback.replay * feedback.batch_size)


def learning_source(cfg: PPOConfig) -> str:
    """The name in ``reward.sources`` of the model that learns. Raises ValueError where there is no such model."""
    names = [one.name for one in read_sources(cfg.reward.sources) if isinstance(one, ModelSourceConfig)]
    wanted = cfg.ppo.feedback.source
    if wanted is None and len(names) == 1:
        return names[0]
    has = ", ".join(names) or "none"
    if wanted is None:
        raise ValueError(
            "ppo.feedback.store is set, and reward.sources must hold the model that learns from people: its models "
            f"are {has}; add one of kind model, or name one of several in ppo.feedback.source."
        )
    if wanted not in names:
        raise ValueError(f"ppo.feedback.source={wanted} is no model of reward.sources, whose models are {has}.")
    return wanted
