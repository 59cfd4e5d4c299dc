"""PPO's rollout in environments: whole episodes in the place of prompts, responses and their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.evaluate import VALIDATION_INDEX
from nemo_rlhf.algorithms.play import Environment, play
from nemo_rlhf.config.environment import EnvironmentConfig
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.types import Episode, Prompt, Rollout, Sample, Scored


@dataclass(frozen=True)
class Episodes:
    """Plays them. ``env``: the number of an environment -> it. ``group_size`` episodes of training side by side have
    the same, for RLOO and GRPO to compare. ``longest``: tokens of an episode."""

    engine: Engine
    tokenizer: Any
    env: Callable[[int], Environment]
    config: EnvironmentConfig
    group_size: int
    longest: int

    def play(self, first: int, num_episodes: int, sampling: SamplingParams) -> Scored:
        """Episodes ``first``, ``first + 1``, ... on every rank; rewards fall on the last token of each turn.

        Raises:
            ValueError: as ``play`` does.
        """
        episodes = play(
            self.engine,
            self.tokenizer,
            self.env,
            num_episodes,
            sampling,
            max_sequence_length=self.longest,
            max_turns=self.config.max_turns,
            first=first,
            number_of=self.number_of,
        )
        samples = tuple(as_sample(episode, first + place) for place, episode in enumerate(episodes))
        return Scored(Rollout(samples), torch.zeros(len(samples)), tuple(map(sampled_rewards, episodes)))

    def validation(self, sampling: SamplingParams) -> Scored:
        """The same of the environments that are kept for it, the first ones."""
        return self.play(VALIDATION_INDEX, self.config.validation_episodes, sampling)

    def number_of(self, episode: int) -> int:
        """That of its environment."""
        if episode >= VALIDATION_INDEX:
            return episode - VALIDATION_INDEX
        return self.config.validation_episodes + episode // self.group_size


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
