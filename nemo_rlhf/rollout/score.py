"""Rollouts to rewards: calls the user's reward function, and checks what it gives back before anything learns from it.

One process calls this for its samples; whoever runs several ranks on the same samples calls it on one of them and
shares the result, or the error.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from nemo_rlhf.types import Rollout, Sample, Scored

RewardFunction = Callable[..., Any]
MetricFunction = Callable[..., Any]
LARGEST = torch.finfo(torch.float32).max
RESERVED = ("samples", "prompts", "outputs", "tokenizer", "output_ids")


def load_reward_function(name: str) -> RewardFunction:
    """The function that ``package.module:name`` names; modules of the current directory are found too.

    Raises ValueError when the name has another form, the module does not exist or cannot be imported, or it has no
    such function.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(f'reward.function is "{name}": it must have the form package.module:name.')
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(
                f'reward.function is "{name}", and there is no module {error.name} on the Python path or in {here}.'
            ) from error
        raise _import_error(name, module_name, error) from error
    except Exception as error:  # whatever the user's module raises
        raise _import_error(name, module_name, error) from error
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            raise ValueError(f'reward.function is "{name}", and {module_name} has no {attribute}.')
        function = getattr(function, part)
    if not callable(function):
        raise ValueError(f'reward.function is "{name}", which is a {type(function).__name__} and no function.')
    return function


def score(reward_fn: RewardFunction, rollout: Rollout, tokenizer: Any) -> Scored:
    """The rewards of ``rollout``: calls ``reward_fn(samples=, prompts=, outputs=, tokenizer=, **metadata)`` once.

    ``samples`` are prompt and response texts together, ``prompts`` and ``outputs`` the two apart: lists of str, without
    special tokens, cut before a stop string. A function with a parameter ``output_ids`` also gets the sampled tokens,
    which it needs to reward each of them: text that is tokenised again has other lengths. Each field of the
    prompts' metadata is a list with one entry a sample, None where its prompt has no such field. It returns a list,
    array or tensor with one entry a sample: a number, or a list (array, tensor) with a number for each response token,
    EOS included.
    Raises ValueError, which names the function and the sample, for anything else, and when the function raises.
    """
    samples = rollout.samples
    if not samples:
        return Scored(rollout, torch.zeros(0))
    name = _name(reward_fn)
    returned = _call(reward_fn, "reward", samples, tokenizer)
    entries = _entries(returned, len(samples), name)
    scores = torch.zeros(len(samples))
    dense = [torch.zeros(len(sample.response_ids)) for sample in samples]
    is_dense = False
    for index, (entry, sample) in enumerate(zip(entries, samples, strict=True)):
        entry = _plain(entry)
        if isinstance(entry, (list, tuple)):
            is_dense = True
            dense[index] = _token_rewards(entry, sample, name, index)
        else:
            scores[index] = _number(entry, name, f"sample {index}")
    return Scored(rollout, scores, tuple(dense) if is_dense else None)


def call_metric(metric_fn: MetricFunction, rollout: Rollout, tokenizer: Any) -> dict[str, float]:
    """The mean of every metric that ``metric_fn`` returns for ``rollout``; it is called as a reward function is.

    Raises ValueError when the function raises, or returns anything but a dict of numbers or of lists of numbers.
    """
    name = _name(metric_fn)
    returned = _call(metric_fn, "metric", rollout.samples, tokenizer)
    if not isinstance(returned, dict):
        raise ValueError(f"The metric function {name} returned {_show(returned)}, and must return a dict by name.")
    means = {}
    for key, value in returned.items():
        values = _plain(value)
        values = values if isinstance(values, (list, tuple)) else [values]
        numbers = [_number(entry, name, f'"{key}"', "metric") for entry in values]
        if not numbers:
            raise ValueError(f'The metric function {name} returned an empty list for "{key}".')
        means[str(key)] = sum(numbers) / len(numbers)
    return means


def _call(function: Callable[..., Any], kind: str, samples: Sequence[Sample], tokenizer: Any) -> Any:
    name = _name(function)
    arguments = {
        "samples": [sample.prompt.text + sample.text for sample in samples],
        "prompts": [sample.prompt.text for sample in samples],
        "outputs": [sample.text for sample in samples],
        "tokenizer": tokenizer,
        **_metadata(samples),
    }
    if "output_ids" in _parameters(function):
        arguments["output_ids"] = [list(sample.response_ids) for sample in samples]
    _check_signature(function, kind, name, arguments)
    try:
        return function(**arguments)
    except Exception as error:  # whatever the user's function raises
        raise ValueError(f"The {kind} function {name} raised {_one_line(error)}.") from error


def _parameters(function: Callable[..., Any]) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins have none: the call itself will tell
        return ()


def _metadata(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(key for sample in samples for key in sample.prompt.metadata))
    for name in RESERVED:
        if name in names:
            raise ValueError(
                f'The prompts have a field "{name}", which is what the reward function gets from us: rename the field.'
            )
    return {name: [sample.prompt.metadata.get(name) for sample in samples] for name in names}


def _check_signature(function: Callable[..., Any], kind: str, name: str, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none: the call itself will tell
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"The {kind} function {name} cannot be called with {', '.join(arguments)} ({error}): take what it needs by "
            "these names and the rest as **metadata."
        ) from None


def _entries(returned: Any, num_samples: int, name: str) -> Sequence[Any]:
    plain = _plain(returned)
    if not isinstance(plain, (list, tuple)):
        raise ValueError(
            f"The reward function {name} returned {_show(returned)}, and must return a list with one reward a sample."
        )
    if len(plain) != num_samples:
        raise ValueError(f"The reward function {name} returned {len(plain)} rewards for {num_samples} samples.")
    return plain


def _token_rewards(entry: Sequence[Any], sample: Sample, name: str, index: int) -> torch.Tensor:
    if len(entry) != len(sample.response_ids):
        raise ValueError(
            f"The reward function {name} returned {len(entry)} token rewards for sample {index}, whose response has "
            f"{len(sample.response_ids)} tokens (EOS included): return one a token, or one number for the sample."
        )
    values = [_number(value, name, f"token {position} of sample {index}") for position, value in enumerate(entry)]
    return torch.tensor(values, dtype=torch.float32)


def _plain(value: Any) -> Any:
    """Tensors, arrays and their scalars as numbers and lists; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    return value.tolist() if hasattr(value, "tolist") else value


def _number(value: Any, name: str, where: str, kind: str = "reward") -> float:
    value = _plain(value)
    if not isinstance(value, (int, float)) or not abs(value) <= LARGEST:  # NaN compares as False
        raise ValueError(f"The {kind} function {name} returned {_show(value)} for {where}: it must be a finite number.")
    return float(value)


def _name(function: RewardFunction) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _import_error(name: str, module_name: str, error: Exception) -> ValueError:
    return ValueError(f'reward.function is "{name}", and importing {module_name} raised {_one_line(error)}.')
