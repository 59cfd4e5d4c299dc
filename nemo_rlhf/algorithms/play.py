"""Episodes of a model with an environment: many at once through the engine's slots, which keep their caches from turn
to turn.

Environments live on one rank of each replica; what they say is shared, so that every rank sees the same episodes.
Sampled tokens are never tokenised again: only what an environment says is encoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from nemo_rlhf.data.tokenizer import encode
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import state
from nemo_rlhf.rollout.isolation import foreign, isolated
from nemo_rlhf.rollout.words import brief, plain
from nemo_rlhf.types import Episode, Prompt, Request, Sample

T = TypeVar("T")


class Environment(Protocol):
    """One episode's other side. ``reset`` gives the text that the agent answers first; ``step`` takes an answer,
    without special tokens and cut before a stop string, and gives (text to answer next, reward, whether it is over)."""

    def reset(self) -> str: ...

    def step(self, text: str) -> tuple[str, float, bool]: ...


def play(
    engine: Engine,
    tokenizer: Any,
    env: Callable[[int], Environment],
    num_episodes: int,
    sampling: SamplingParams,
    *,
    max_sequence_length: int,
    max_turns: int | None = None,
    first: int = 0,
    number_of: Callable[[int], int] = int,
) -> list[Episode]:
    """Episodes ``first``, ``first + 1``, ..., each data-parallel rank its share; all of them, in order, on every rank.
    All ranks call it. An episode's index keys its sampling noise; ``number_of`` it is that of its environment.

    An episode ends when its environment says so, after ``max_turns`` turns, or where another turn of
    ``sampling.max_new_tokens`` would not fit in ``max_sequence_length`` tokens (the engine's).

    Raises:
        ValueError: on every rank, where an environment raised, returned something else, or said too much at first.
    """
    if num_episodes < 1:
        raise ValueError(f"num_episodes={num_episodes}: at least one episode has to be played.")
    if max_turns is not None and max_turns < 1:
        raise ValueError(f"max_turns={max_turns}: give at least 1, or None for no limit.")
    table = _Table(env, number_of, tokenizer, sampling, max_sequence_length, max_turns)
    mine = range(first, first + num_episodes)[state.dp_rank() :: state.dp_size()]
    requests = _together(lambda: table.begin(mine))[state.dp_rank()]

    def run() -> list[Episode]:
        engine.generate(requests, sampling, table.go_on)
        return [table.episode(index) for index in mine]

    parts = _together(run)
    return [parts[index % len(parts)][index // len(parts)] for index in range(num_episodes)]


@dataclass
class _Course:
    """An episode so far."""

    turns: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    token_rewards: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    done: bool = False

    def observe(self, text: str, token_ids: Sequence[int]) -> None:
        self.turns.append(text)
        self._append(token_ids, False)

    def act(self, text: str, token_ids: Sequence[int], reward: float) -> None:
        self.turns.append(text)
        self._append(token_ids, True)
        self.rewards.append(reward)
        self.token_rewards[-1] = reward

    def _append(self, token_ids: Sequence[int], is_action: bool) -> None:
        self.token_ids += token_ids
        self.action_mask += [is_action] * len(token_ids)
        self.token_rewards += [0.0] * len(token_ids)


class _Table:
    """The episodes of one replica."""

    def __init__(
        self,
        env: Callable[[int], Environment],
        number_of: Callable[[int], int],
        tokenizer: Any,
        sampling: SamplingParams,
        max_sequence_length: int,
        max_turns: int | None,
    ) -> None:
        self._make, self._number_of = env, number_of
        self._tokenizer = tokenizer
        self._longest = max_sequence_length - sampling.max_new_tokens
        self._max_turns = max_turns
        self._environments: dict[int, Environment] = {}  # on the leader only
        self._courses: dict[int, _Course] = {}

    def begin(self, indices: Sequence[int]) -> list[Request]:
        texts = _from_leader(lambda: [self._reset(index) for index in indices])
        requests = []
        for index, text in zip(indices, texts, strict=True):
            ids = encode(self._tokenizer, text, start=True)
            if not ids:
                number = self._number_of(index)
                raise ValueError(f"reset() of environment {number} returned a text without tokens: give at least one.")
            course = self._courses[index] = _Course()
            course.observe(text, ids)
            requests.append(Request(Prompt(tuple(ids), text), index))
        return requests

    def go_on(self, samples: Sequence[Sample]) -> list[list[int] | None]:
        """What the environments answer, in tokens; None where an episode is over."""
        answers = _from_leader(lambda: [self._step(sample.sample_index, sample.text) for sample in samples])
        return [self._continue(sample, *answer) for sample, answer in zip(samples, answers, strict=True)]

    def episode(self, index: int) -> Episode:
        course = self._courses[index]
        turns, ids, mask = tuple(course.turns), tuple(course.token_ids), tuple(course.action_mask)
        return Episode(turns, ids, mask, tuple(course.rewards), tuple(course.token_rewards), course.done)

    def _continue(self, sample: Sample, text: str, reward: float, done: bool) -> list[int] | None:
        course = self._courses[sample.sample_index]
        action = self._tokenizer.decode(list(sample.response_ids), clean_up_tokenization_spaces=False)
        course.act(action, sample.response_ids, reward)
        course.done = done
        ids = encode(self._tokenizer, text, start=False)
        is_full = len(course.rewards) == self._max_turns or len(course.token_ids) + len(ids) > self._longest
        if done or is_full:
            self._environments.pop(sample.sample_index, None)
            return None
        course.observe(text, ids)
        return ids

    def _reset(self, index: int) -> str:
        number = self._number_of(index)
        environment = self._environments[index] = _call(f"env({number})", self._make, number)
        text = _call(f"reset() of environment {number}", environment.reset)
        if not isinstance(text, str):
            raise ValueError(f"reset() of environment {number} returned a {type(text).__name__}, and must return text.")
        return text

    def _step(self, index: int, action: str) -> tuple[str, float, bool]:
        number = self._number_of(index)
        answer = _call(f"step() of environment {number}", self._environments[index].step, action)
        said = f"step() of environment {number} returned"
        if not isinstance(answer, tuple) or len(answer) != 3:
            raise ValueError(f"{said} {brief(answer)}, and must return (text, reward, done).")
        text, reward, done = answer
        if not isinstance(text, str):
            raise ValueError(f"{said} a {type(text).__name__} as text, and must return (text, reward, done).")
        reward, done = plain(reward), plain(done)
        if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise ValueError(f"{said} the reward {brief(reward)}, which is not a finite number.")
        if not isinstance(done, bool):
            raise ValueError(f"{said} {brief(done)} for whether the episode is over, and must return True or False.")
        return text, float(reward), done


def _call(what: str, function: Callable[..., T], *arguments: Any) -> T:
    with foreign(what):
        return function(*arguments)


def _from_leader(work: Callable[[], T]) -> T:
    """What ``work``, which is people's code, gives on this replica's leader, or its ValueError, on all its ranks."""
    result: tuple[T | None, str | None] = None, None
    if state.is_model_leader():
        try:
            with isolated():
                result = work(), None
        except ValueError as error:
            result = None, str(error)
    value, failure = state.share_object(result)
    if failure is not None:
        raise ValueError(failure)
    return value


def _together(work: Callable[[], T]) -> list[T]:
    """What ``work`` gives on each data-parallel rank, or the first ValueError, on all of them."""
    try:
        result: tuple[T | None, str | None] = work(), None
    except ValueError as error:
        result = None, str(error)
    parts = state.gather_objects(result)
    for _, failure in parts:
        if failure is not None:
            raise ValueError(failure)
    return [value for value, _ in parts]
