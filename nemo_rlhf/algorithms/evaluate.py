"""Sampling and scoring over all data-parallel ranks: for a step's rollout, and for validation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import checkpoint, state
from nemo_rlhf.rollout.collect import in_order, make_requests
from nemo_rlhf.rollout.score import RewardFunction, call_metric, score
from nemo_rlhf.types import Prompt, Request, Rollout, Sample, Scored

Metrics = dict[str, float]
# validation draws with noise of its own, whatever rollouts draw with the same seed
_VALIDATION_INDEX = 2**40


def sample_and_score(
    engine: Engine,
    requests: Sequence[Request],
    sampling: SamplingParams,
    reward_fn: RewardFunction,
    tokenizer: Any,
) -> tuple[Scored, float]:
    """Sample the requests and score them, each data-parallel rank its share; the whole, in order, on every rank.

    The reward function runs on one rank of each replica. Returns the scored rollout and the seconds that scoring took.

    Raises:
        ValueError: on every rank, where the reward function failed on any (see ``rollout.score``).
    """
    mine = engine.generate(requests[state.dp_rank() :: state.dp_size()], sampling)
    start = time.perf_counter()

    def work() -> Scored:
        return score(reward_fn, Rollout(mine), tokenizer)

    parts: list[Scored] = _on_leaders(work)
    elapsed = time.perf_counter() - start
    samples = in_order([part.rollout.samples for part in parts])
    scores = {s.sample_index: v for part in parts for s, v in zip(part.rollout.samples, part.scores, strict=True)}
    merged = torch.stack([scores[sample.sample_index] for sample in samples])
    dense = None
    if any(part.token_rewards is not None for part in parts):
        by_index = {
            sample.sample_index: rewards
            for part in parts
            for sample, rewards in zip(part.rollout.samples, part.token_rewards or _zeros(part), strict=True)
        }
        dense = tuple(by_index[sample.sample_index] for sample in samples)
    return Scored(Rollout(samples), merged, dense), elapsed


def sample(engine: Engine, requests: Sequence[Request], sampling: SamplingParams) -> tuple[Sample, ...]:
    """Sample the requests, each data-parallel rank its share; all of them, in order, on every rank."""
    engine.check(requests, sampling)  # all of them, so that no rank fails alone
    mine = engine.generate(requests[state.dp_rank() :: state.dp_size()], sampling)
    return in_order(state.gather_objects(mine))


def _zeros(part: Scored) -> list[torch.Tensor]:
    return [torch.zeros(len(sample.response_ids)) for sample in part.rollout.samples]


def _on_leaders(work: Callable[[], Any]) -> list[Any]:
    """What ``work`` gives on the leader of each replica, in their order, on every rank; or its ValueError on all."""
    result: Any = None
    failure: str | None = None
    if state.is_model_leader():
        try:
            result = work()
        except ValueError as error:
            failure = str(error)
    gathered = state.gather_objects(state.share_object((result, failure)))
    for _, message in gathered:
        if message is not None:
            raise ValueError(message)
    return [value for value, _ in gathered]


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    variants: Sequence[tuple[str, dict[str, Any]]],
    reward_fn: RewardFunction | None,
    metric_fn: Callable[..., dict[str, Any]] | None,
    tokenizer: Any,
    mode: str,
) -> Metrics:
    """``val/reward`` (where there is a reward function), ``val/response_length`` and ``val/<name>`` of what
    ``metric_fn`` returns, for each variant of sampling, named by its suffix. In a sweep the plain names are those of
    the best variant by reward (``mode``), or of the first.

    Raises:
        ValueError: reward or metric function failed.
    """
    by_suffix: dict[str, Metrics] = {}
    requests = make_requests(prompts, 1, _VALIDATION_INDEX)
    for suffix, values in variants:
        sampling = SamplingParams(**values)
        metrics = {}
        if reward_fn is None:
            rollout = Rollout(sample(engine, requests, sampling))
        else:
            scored, _ = sample_and_score(engine, requests, sampling, reward_fn, tokenizer)
            rollout, totals = scored.rollout, scored.scores.clone()
            for row, rewards in enumerate(scored.token_rewards or ()):
                totals[row] += rewards.sum()
            metrics["val/reward"] = float(totals.mean())
        lengths = [len(sample.response_ids) for sample in rollout.samples]
        metrics["val/response_length"] = sum(lengths) / len(lengths)
        if metric_fn is not None:
            whole = _on_leaders(partial(call_metric, metric_fn, rollout, tokenizer))[0]
            metrics |= {f"val/{name}": value for name, value in whole.items()}
        by_suffix[suffix] = metrics
    choose = max if mode == "max" else min
    best = choose(by_suffix.values(), key=lambda metrics: metrics.get("val/reward", 0.0))
    named = {f"{name}{suffix}": value for suffix, metrics in by_suffix.items() for name, value in metrics.items()}
    return {**best, **named}


def write_samples(path: Path, scored: Scored) -> None:
    """One JSON object a sample: prompt, response, score, how it ended, and the prompt's metadata."""

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for row, sample in enumerate(scored.rollout.samples):
                dense = scored.token_rewards[row].sum() if scored.token_rewards is not None else 0.0
                total = float(scored.scores[row] + dense)
                record = {
                    **sample.prompt.metadata,
                    "prompt": sample.prompt.text,
                    "response": sample.text,
                    "score": total if math.isfinite(total) else None,
                    "finish_reason": sample.finish_reason,
                    "num_tokens": len(sample.response_ids),
                }
                file.write(json.dumps(record, default=str) + "\n")

    checkpoint.on_rank_zero(write)
