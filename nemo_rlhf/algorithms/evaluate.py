"""Sampling and scoring over all data-parallel ranks: for a step's rollout, and for validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from nemo_rlhf.algorithms.samples import rollout_records, sample_records, total_scores, write_records
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import state
from nemo_rlhf.rollout.collect import in_order, make_requests
from nemo_rlhf.rollout.experience import describe_turns
from nemo_rlhf.rollout.score import Unavailable, call_metric
from nemo_rlhf.rollout.sources import CalledSource, score_all
from nemo_rlhf.types import Prompt, Request, Rollout, Sample, Scored

Metrics = dict[str, float]
# validation draws with noise of its own, whatever rollouts draw with the same seed
VALIDATION_INDEX = 2**40


class CollectiveSource(Protocol):
    """A source of rewards that all ranks run together: a reward model in this job."""

    name: str
    weight: float

    def scores(self, samples: Sequence[Sample]) -> Tensor:
        """Unweighted scores [samples] fp32 on the host. All ranks call it with the same samples; all get all scores."""
        ...


@dataclass(frozen=True)
class Rewards:
    """Where rewards come from: what one rank of each replica calls for its samples, and what all run for all."""

    called: Sequence[CalledSource] = ()
    collective: Sequence[CollectiveSource] = ()


def sample_and_score(
    engine: Engine,
    requests: Sequence[Request],
    sampling: SamplingParams,
    rewards: Rewards,
    tokenizer: Any,
) -> tuple[Scored, float]:
    """Sample the requests and score them, each data-parallel rank its share; the whole, in order, on every rank.

    Returns the scored rollout and the seconds that scoring took.

    Raises:
        ValueError: on every rank, where a source failed on any (see ``rollout.score``).
        Unavailable: the same, where a service stayed away.
    """
    mine = engine.generate(requests[state.dp_rank() :: state.dp_size()], sampling)
    start = time.perf_counter()
    scored = _in_order(_on_leaders(lambda: score_all(rewards.called, Rollout(mine), tokenizer)))
    for source in rewards.collective:
        scores = source.scores(scored.rollout.samples)
        by_source = {**scored.by_source, source.name: scores}
        scored = replace(scored, scores=scored.scores + source.weight * scores, by_source=by_source)
    return scored, time.perf_counter() - start


def source_metrics(scored: Scored) -> Metrics:
    """``reward/<name>``: mean score of each named source, unweighted; ``reward/<name>/fallbacks``: share of the samples
    that got its fallback score."""
    means = {f"reward/{name}": float(scores.mean()) for name, scores in scored.by_source.items()}
    size = len(scored.rollout.samples)
    return means | {f"reward/{name}/fallbacks": count / size for name, count in scored.fallbacks.items()}


def _in_order(parts: Sequence[Scored]) -> Scored:
    """The rollouts of all data-parallel ranks as one, in the order of their samples' indices."""
    samples = in_order([part.rollout.samples for part in parts])
    places = [sample.sample_index for part in parts for sample in part.rollout.samples]
    order = sorted(range(len(places)), key=places.__getitem__)
    dense = None
    if any(part.token_rewards is not None for part in parts):
        rows = [rewards for part in parts for rewards in (part.token_rewards or _zeros(part))]
        dense = tuple(rows[row] for row in order)
    return Scored(
        Rollout(samples),
        torch.cat([part.scores for part in parts])[order],
        dense,
        {name: torch.cat([part.by_source[name] for part in parts])[order] for name in parts[0].by_source},
        {name: sum(part.fallbacks[name] for part in parts) for name in parts[0].fallbacks},
    )


def sample(engine: Engine, requests: Sequence[Request], sampling: SamplingParams) -> tuple[Sample, ...]:
    """Sample the requests, each data-parallel rank its share; all of them, in order, on every rank."""
    engine.check(requests, sampling)  # all of them, so that no rank fails alone
    mine = engine.generate(requests[state.dp_rank() :: state.dp_size()], sampling)
    return in_order(state.gather_objects(mine))


def _zeros(part: Scored) -> list[torch.Tensor]:
    return [torch.zeros(len(sample.response_ids)) for sample in part.rollout.samples]


def _on_leaders(work: Callable[[], Any]) -> list[Any]:
    """What ``work`` gives on the leader of each replica, in their order, on every rank; or its ValueError, or that
    something is unavailable, on all."""
    result: Any = None
    failure: tuple[type[Exception], str] | None = None
    if state.is_model_leader():
        try:
            result = work()
        except (ValueError, Unavailable) as error:
            failure = Unavailable if isinstance(error, Unavailable) else ValueError, str(error)
    gathered = state.gather_objects(state.share_object((result, failure)))
    for _, failure in gathered:
        if failure is not None:
            kind, message = failure
            raise kind(message)
    return [value for value, _ in gathered]


def from_prompts(
    engine: Engine, prompts: Sequence[Prompt], rewards: Rewards | None, tokenizer: Any
) -> Callable[[SamplingParams], Scored | Rollout]:
    """What ``evaluate`` looks at where there are prompts: a response to each, scored if there are rewards."""
    requests = make_requests(prompts, 1, VALIDATION_INDEX)

    def collect(sampling: SamplingParams) -> Scored | Rollout:
        if rewards is None:
            return Rollout(sample(engine, requests, sampling))
        return sample_and_score(engine, requests, sampling, rewards, tokenizer)[0]

    return collect


def evaluate(
    collect: Callable[[SamplingParams], Scored | Rollout],
    variants: Sequence[tuple[str, dict[str, Any]]],
    metric_fn: Callable[..., dict[str, Any]] | None,
    tokenizer: Any,
    mode: str,
    samples_path: Path,
) -> Metrics:
    """``val/reward`` and ``val/reward/<name>`` (where ``collect`` gives rewards), ``val/response_length``,
    ``val/turns/mean`` of episodes, and ``val/<name>`` of what ``metric_fn`` returns, for each variant of sampling,
    named by its suffix. In a sweep the plain names are those of the best variant by reward (``mode``), or of the first.
    The samples go to ``samples_path``, with the variant as "sampling" in a sweep.

    Raises:
        ValueError: reward or metric function failed.
        Unavailable: a source of rewards stayed away.
    """
    by_suffix: dict[str, Metrics] = {}
    records: list[dict[str, Any]] = []
    for suffix, values in variants:
        collected = collect(SamplingParams(**values))
        metrics = {}
        if isinstance(collected, Rollout):
            rollout, sampled = collected, sample_records(collected.samples, {})
        else:
            rollout, sampled = collected.rollout, rollout_records(collected)
            metrics["val/reward"] = float(total_scores(collected).mean())
            metrics |= {f"val/{name}": value for name, value in source_metrics(collected).items()}
        lengths = [sample.num_sampled for sample in rollout.samples]
        metrics["val/response_length"] = sum(lengths) / len(lengths)
        metrics |= {f"val/{name}": value for name, value in describe_turns(rollout.samples).items()}
        if metric_fn is not None:
            whole = _on_leaders(partial(call_metric, metric_fn, rollout, tokenizer))[0]
            metrics |= {f"val/{name}": value for name, value in whole.items()}
        by_suffix[suffix] = metrics
        records += [{"sampling": suffix.removeprefix("@"), **record} if suffix else record for record in sampled]
    write_records(samples_path, records)
    choose = max if mode == "max" else min
    best = choose(by_suffix.values(), key=lambda metrics: metrics.get("val/reward", 0.0))
    named = {f"{name}{suffix}": value for suffix, metrics in by_suffix.items() for name, value in metrics.items()}
    return {**best, **named}
