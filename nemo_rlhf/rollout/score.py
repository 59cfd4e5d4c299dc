"""Rollouts to rewards: calls the user's reward function, and checks what it gives back before anything learns from it.

One process calls this for its samples; whoever runs several ranks on the same samples calls it on one of them and
shares the result, or the error.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from threading import Thread
from typing import Any

import torch

from nemo_rlhf.rollout.isolation import copied, copy_of, foreign, no_way_out_here
from nemo_rlhf.rollout.words import brief, plain
from nemo_rlhf.types import Rollout, Sample, Scored

RewardFunction = Callable[..., Any]
MetricFunction = Callable[..., Any]
_SHIPPED = "nemo_rlhf.rollout.rules"
LARGEST = torch.finfo(torch.float32).max
# what a function gets where it has a parameter of that name
ON_REQUEST: dict[str, Callable[[Sequence[Sample]], list[Any]]] = {
    "output_ids": lambda samples: [list(sample.response_ids) for sample in samples],
    "finish_reasons": lambda samples: [sample.finish_reason for sample in samples],
}
RESERVED = ("samples", "prompts", "outputs", "tokenizer", *ON_REQUEST)


class Unavailable(Exception):
    """A source of rewards has not answered for as long as the run may wait for it. The step cannot be done now; it can
    be done later, from the same state."""


class RewardError(ValueError):
    """A source of rewards of this package found what is wrong, and says so in a whole sentence."""


def score(reward_fn: RewardFunction, rollout: Rollout, tokenizer: Any) -> Scored:
    """The rewards of ``rollout``: calls ``reward_fn(samples=, prompts=, outputs=, tokenizer=, **metadata)`` once.

    ``samples`` are prompt and response texts together, ``prompts`` and ``outputs`` the two apart: lists of str, without
    special tokens, cut before a stop string. A function with a parameter ``output_ids`` also gets the sampled tokens,
    which it needs to reward each of them: text that is tokenised again has other lengths; with ``finish_reasons``, how
    each response ended (``types.FinishReason``). Each field of the prompts' metadata is a list with one entry a
    sample, None where its prompt has no such field. It returns, or its coroutine does, a list, array or tensor with one
    entry a sample: a number, or a list (array, tensor) with a number for each response token, EOS included.
    Raises ValueError, which names the function and the sample, for anything else, and when the function raises.
    """
    samples = rollout.samples
    if not samples:
        return Scored(rollout, torch.zeros(0))
    what = _title(reward_fn, "reward")
    returned = _call(reward_fn, what, samples, tokenizer)
    entries = _entries(returned, len(samples), what)
    scores = torch.zeros(len(samples))
    dense = [torch.zeros(len(sample.response_ids)) for sample in samples]
    is_dense = False
    for index, (entry, sample) in enumerate(zip(entries, samples, strict=True)):
        entry = plain(entry)
        if isinstance(entry, (list, tuple)):
            is_dense = True
            dense[index] = _token_rewards(entry, sample, what, index)
        else:
            scores[index] = _number(entry, what, f"sample {index}")
    return Scored(rollout, scores, tuple(dense) if is_dense else None)


def call_metric(metric_fn: MetricFunction, rollout: Rollout, tokenizer: Any) -> dict[str, float]:
    """The mean of every metric that ``metric_fn`` returns for ``rollout``; it is called as a reward function is.

    Raises ValueError when the function raises, or returns anything but a dict of numbers or of lists of numbers.
    """
    what = _title(metric_fn, "metric")
    returned = _call(metric_fn, what, rollout.samples, tokenizer)
    if not isinstance(returned, dict):
        raise ValueError(f"The {what} returned {brief(returned)}, and must return a dict by name.")
    means = {}
    for key, value in returned.items():
        values = plain(value)
        values = values if isinstance(values, (list, tuple)) else [values]
        numbers = [_number(entry, what, f'"{key}"') for entry in values]
        if not numbers:
            raise ValueError(f'The {what} returned an empty list for "{key}".')
        means[str(key)] = sum(numbers) / len(numbers)
    return means


def total_scores(scored: Scored) -> torch.Tensor:
    """One score a sample [samples]; rewards per token are summed."""
    if scored.token_rewards is None:
        return scored.scores
    return scored.scores + torch.stack([rewards.sum() for rewards in scored.token_rewards])


def _call(function: Callable[..., Any], what: str, samples: Sequence[Sample], tokenizer: Any) -> Any:
    is_ours = hasattr(function, "reward_title")  # people's code then runs elsewhere
    may_change = not is_ours and _innermost(function).__module__ != _SHIPPED
    arguments = {
        "samples": [sample.prompt.text + sample.text for sample in samples],
        "prompts": [sample.prompt.text for sample in samples],
        "outputs": [sample.text for sample in samples],
        "tokenizer": tokenizer,
        **_metadata(samples, copied if may_change else _itself),
    }
    asked = _parameters(function)
    arguments |= {key: values(samples) for key, values in ON_REQUEST.items() if key in asked}
    _check_signature(function, what, arguments)
    if not is_ours:
        arguments["tokenizer"] = copy_of(tokenizer)
    with nullcontext() if is_ours else foreign(f"The {what}", (Unavailable, RewardError)):  # those say it themselves
        returned = function(**arguments)
        return _finished(returned) if inspect.iscoroutine(returned) else returned


def _finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns. In a thread: whoever trains from a notebook has a loop running in this one."""
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            with no_way_out_here():
                outcome.set_result(asyncio.run(coroutine))
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()  # a daemon, for which Ctrl-C does not wait
    return outcome.result()


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins have none: the call itself will tell
        return ()


def _itself(thing: Any) -> Any:
    return thing


def _metadata(samples: Sequence[Sample], handed: Callable[[Any], Any]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(key for sample in samples for key in sample.prompt.metadata))
    for name in RESERVED:
        if name in names:
            raise ValueError(
                f'The prompts have a field "{name}", which is what the reward function gets from us: rename the field.'
            )
    return {name: [handed(sample.prompt.metadata.get(name)) for sample in samples] for name in names}


def _check_signature(function: Callable[..., Any], what: str, arguments: dict[str, Any]) -> None:
    for key in getattr(function, "keywords", {}):  # of a partial, or a pool
        if key in arguments:
            raise ValueError(f'The prompts have a field "{key}", which is an argument of the {what} too: rename it.')
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none: the call itself will tell
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"The {what} cannot be called with {', '.join(arguments)} ({error}): take what it needs by "
            "these names and the rest as **metadata."
        ) from None


def _entries(returned: Any, num_samples: int, what: str) -> Sequence[Any]:
    rewards = plain(returned)
    if not isinstance(rewards, (list, tuple)):
        raise ValueError(f"The {what} returned {brief(returned)}, and must return a list with one reward a sample.")
    if len(rewards) != num_samples:
        raise ValueError(f"The {what} returned {len(rewards)} rewards for {num_samples} samples.")
    return rewards


def _token_rewards(entry: Sequence[Any], sample: Sample, what: str, index: int) -> torch.Tensor:
    if len(entry) != len(sample.response_ids):
        raise ValueError(
            f"The {what} returned {len(entry)} token rewards for sample {index}, whose response has "
            f"{len(sample.response_ids)} tokens (EOS included): return one a token, or one number for the sample."
        )
    values = [_number(value, what, f"token {position} of sample {index}") for position, value in enumerate(entry)]
    return torch.tensor(values, dtype=torch.float32)


def _number(value: Any, what: str, where: str) -> float:
    value = plain(value)
    if not isinstance(value, (int, float)) or not abs(value) <= LARGEST:  # NaN compares as False
        raise ValueError(f"The {what} returned {brief(value)} for {where}: it must be a finite number.")
    return float(value)


def _title(function: Callable[..., Any], kind: str) -> str:
    """How sentences name it: as it says itself, or as the function of that kind that it is."""
    named = _innermost(function)
    return getattr(function, "reward_title", None) or f"{kind} function {named.__module__}.{named.__qualname__}"


def _innermost(function: Callable[..., Any]) -> Any:
    """The function that partials stand around, or the class of an object that is called."""
    while isinstance(function, partial):
        function = function.func
    return function if hasattr(function, "__qualname__") else type(function)
