"""Several sources of one reward: opened from the configuration, called one after the other, added up by weight.

These are the sources that the leader of a replica calls for its samples. Reward models in the same job, which all
ranks run together, are not among them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nemo_rlhf.config.sources import FunctionSourceConfig, HttpSourceConfig, SourceConfig
from nemo_rlhf.rollout.http import RewardService
from nemo_rlhf.rollout.named import load_function
from nemo_rlhf.rollout.pool import Pool
from nemo_rlhf.rollout.score import RESERVED, RewardFunction, score, total_scores
from nemo_rlhf.types import Rollout, Scored


@dataclass(frozen=True)
class CalledSource:
    """``name``: what its scores are logged under; None: nothing, since they are the whole reward."""

    reward_fn: RewardFunction
    name: str | None = None
    weight: float = 1.0


def open_sources(
    configs: Sequence[SourceConfig], is_stopping: Callable[[], bool], patience_s: float
) -> list[CalledSource]:
    """The functions and services among ``configs``, in their order. Workers start and services are asked when the
    first rollout is scored. ``is_stopping``: whether somebody waits for this run to end; ``patience_s``: how long other
    ranks wait for scores.

    Raises:
        ValueError: a function does not exist, or does not take its arguments, or a service's token is not set.
    """
    sources = []
    for place, config in enumerate(configs):
        if isinstance(config, FunctionSourceConfig):
            function = _open_function(config, f"reward.sources[{place}]")
            sources.append(CalledSource(function, config.name, config.weight))
        elif isinstance(config, HttpSourceConfig):
            service = RewardService(config, is_stopping, patience_s - config.timeout_s)
            sources.append(CalledSource(service, config.name, config.weight))
    return sources


def score_all(sources: Sequence[CalledSource], rollout: Rollout, tokenizer: Any) -> Scored:
    """The sum of every source's scores times its weight. Numbers for samples add up to ``scores``, those for tokens to
    ``token_rewards``.

    Raises:
        ValueError: as ``score``.
        Unavailable: a service stayed away.
    """
    scores = torch.zeros(len(rollout.samples))
    dense = [torch.zeros(len(sample.response_ids)) for sample in rollout.samples]
    is_dense = False
    by_source: dict[str, torch.Tensor] = {}
    fallbacks: dict[str, int] = {}
    for source in sources:
        one = score(source.reward_fn, rollout, tokenizer)
        scores += source.weight * one.scores
        if one.token_rewards is not None:
            is_dense = True
            dense = [so_far + source.weight * new for so_far, new in zip(dense, one.token_rewards, strict=True)]
        if source.name is not None:
            by_source[source.name] = total_scores(one)
            if isinstance(source.reward_fn, Pool) and source.reward_fn.fallback is not None:
                fallbacks[source.name] = source.reward_fn.last_fallbacks if rollout.samples else 0
    return Scored(rollout, scores, tuple(dense) if is_dense else None, by_source, fallbacks)


def _open_function(config: FunctionSourceConfig, where: str) -> RewardFunction:
    function = load_function(config.function, f"{where}.function")
    for key in config.arguments:
        if key in RESERVED:
            raise ValueError(f"{where}.arguments has {key}, which every reward function gets from us: leave it out.")
    try:
        inspect.signature(function).bind_partial(**config.arguments)
    except TypeError as error:
        raise ValueError(f"{where}.arguments do not fit {config.function} ({error}): change one of them.") from None
    except ValueError:  # builtins have no signature: the call itself will tell
        pass
    if config.workers:
        return Pool(config, function)
    return partial(function, **config.arguments) if config.arguments else function
