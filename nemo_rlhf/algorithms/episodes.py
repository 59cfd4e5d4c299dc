"""PPO's rollout in environments: whole episodes in the place of prompts, responses and their scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.evaluate import VALIDATION_INDEX
from nemo_rlhf.algorithms.play import Environment, play
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.types import Episode, Prompt, Rollout, Sample, Scored


def play_and_score(
    engine: Engine,
    tokenizer: Any,
    env: Callable[[int], Environment],
    sampling: SamplingParams,
    first: int,
    num_episodes: int,
    *,
    max_turns: int | None,
    longest: int,
) -> Scored:
    """``num_episodes`` from number ``first`` on, on every rank, whose rewards fall on the last token of each turn.
    Those of validation are counted from ``VALIDATION_INDEX`` on, for the noise; their environments from 0.

    Raises:
        ValueError: as ``play`` does.
    """
    episodes = play(
        engine,
        tokenizer,
        lambda number: env(number % VALIDATION_INDEX),
        num_episodes,
        sampling,
        max_sequence_length=longest,
        max_turns=max_turns,
        first=first,
    )
    samples = tuple(as_sample(episode, first + place) for place, episode in enumerate(episodes))
    return Scored(Rollout(samples), torch.zeros(len(samples)), tuple(map(sampled_rewards, episodes)))


def group(env: Callable[[int], Environment], size: int, first: int) -> Callable[[int], Environment]:
    """``size`` episodes side by side in each environment from number ``first`` on: what RLOO and GRPO compare."""
    return lambda number: env(first + number // size)


def as_sample(episode: Episode, number: int) -> Sample:
    """What the environment said first is the prompt; all the rest is the response, parts of which were sampled."""
    start = episode.action_mask.index(True)
    return Sample(
        prompt=Prompt(episode.token_ids[:start], episode.turns[0]),
        sample_index=number,
        response_ids=episode.token_ids[start:],
        text="".join(episode.turns[1:]),
        finish_reason="eos" if episode.done else "length",
        action_mask=episode.action_mask[start:],
    )


def sampled_rewards(episode: Episode) -> Tensor:
    """Rewards [sampled tokens] fp32."""
    pairs = zip(episode.token_rewards, episode.action_mask, strict=True)
    return torch.tensor([reward for reward, is_action in pairs if is_action], dtype=torch.float32)
