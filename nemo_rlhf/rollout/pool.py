"""Reward functions that may crash, hang or leak: each sample is scored in a worker process that can be ended.

A worker has one sample at a time, so it is known which sample a crash or a time-out belongs to.
"""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import wait
from time import monotonic
from typing import Any

from nemo_rlhf.config.sources import FunctionSourceConfig
from nemo_rlhf.rollout.score import RewardError
from nemo_rlhf.rollout.terminal import printable
from nemo_rlhf.rollout.words import brief
from nemo_rlhf.untrusted import parse_json

_START_S = 300.0  # that a worker may take for its imports, from a slow shared disk
_END_S = 2.0  # that it may take to end once its connection has
_PIECE = 1 << 16  # bytes
_LONGEST_ANSWER = 1 << 26  # bytes: a number a token has far fewer


class _Lost(Exception):
    """A worker has ended, or is late."""


class _Worker:
    """A process, the end of a socket to it, and which sample it has until when.

    It gets pickles and answers with lines of JSON. What a policy wrote may run in it, and owns the socket then: nothing
    that comes from there is unpickled, and half a line is waited for no longer than a whole one.
    """

    def __init__(self, greeting: bytes) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nemo_rlhf.rollout.pool_worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,  # so that what it starts can be ended with it
            )
        self.is_ready = False
        self.sample: int | None = None
        self._ask(greeting, _START_S)

    def hand_over(self, sample: int, call: bytes, timeout_s: float | None) -> None:
        self.sample = sample
        self._ask(call, timeout_s)

    def listen(self) -> bool:
        """Read what has come; whether nothing more is to come before it is asked again."""
        with suppress(BlockingIOError):
            try:
                piece = self.socket.recv(_PIECE, socket.MSG_DONTWAIT)
            except ConnectionResetError:
                piece = b""
            self._said += piece
            return not piece or piece.endswith(b"\n") or len(self._said) > _LONGEST_ANSWER
        return False

    def answer(self) -> tuple[bool, Any]:
        """What it has answered. Raises _Lost, with what happened, where it has not and will not."""
        if self._said.endswith(b"\n"):
            return _checked(bytes(self._said))
        if len(self._said) > _LONGEST_ANSWER:
            raise _Lost(f"answered with more than {_LONGEST_ANSWER >> 20} MiB")
        if self.deadline <= monotonic():
            raise _Lost(f"took more than {self._limit_s:g} s")
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            raise _Lost("closed its connection") from None
        if code >= 0:
            raise _Lost(f"ended its process with exit code {code}")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        raise _Lost(f"was killed by {name}")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """End it, and the processes that the user's function has started."""
        self.socket.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, pickled: bytes, limit_s: float | None) -> None:
        self._said = bytearray()
        self._limit_s = float("inf") if limit_s is None else limit_s
        self.deadline = monotonic() + self._limit_s
        self.socket.settimeout(limit_s)
        with suppress(OSError):  # it has ended, or does not listen: ``answer`` will find it
            self.socket.sendall(pickled)


def _checked(line: bytes) -> tuple[bool, Any]:
    """Whether a call went well, with its reward, or a sentence of what was wrong. Raises _Lost for anything else."""
    try:
        is_well, said = parse_json(line, "the answer")
    except (ValueError, TypeError):
        is_well, said = None, None
    if is_well is False and isinstance(said, str):
        return False, printable(said)
    values = said if isinstance(said, list) else [said]
    if is_well is True and (said is None or all(type(value) in (int, float) for value in values)):
        return True, said
    raise _Lost("answered with something other than numbers")


class Pool:
    """A reward function of the same signature and name, whose calls happen in workers, for one sample each.

    Workers start at the first call and stay. ``fallback``: the score of a sample whose call failed, None where that is
    an error. ``last_fallbacks``: how many samples of the last call got it. The tokenizer is handed over where the
    function has a parameter of that name.
    """

    def __init__(self, config: FunctionSourceConfig, function: Callable[..., Any]) -> None:
        self._config, self.function = config, function
        self.reward_title = f"reward function {config.function}"
        self.keywords = config.arguments  # as of a partial
        self.__signature__ = inspect.signature(partial(function, **config.arguments))
        self._wants_tokenizer = "tokenizer" in self.__signature__.parameters
        self._workers: list[_Worker] = []
        self.close = weakref.finalize(self, _end, self._workers)
        self.fallback = None if config.on_failure == "error" else float(config.on_failure)
        self.last_fallbacks = 0
        self._has_warned = False

    def __call__(self, *, tokenizer: Any, **given: list[Any]) -> list[Any]:
        """Rewards, one a sample.

        Raises:
            RewardError: a worker cannot start, or, without a fallback, a sample's call failed; the sentence names it.
        """
        self.last_fallbacks = 0
        self._workers[:] = [worker for worker in self._workers if worker.is_alive()]
        greeting = (self._config.function, self._config.arguments, tokenizer if self._wants_tokenizer else None)
        calls = [{name: [values[row]] for name, values in given.items()} for row in range(len(given["samples"]))]
        try:
            return self._score(calls, pickle.dumps(greeting))
        except BaseException:
            _end(self._workers)  # some may still be busy with what nobody waits for
            raise

    def _score(self, calls: list[dict[str, Any]], greeting: bytes) -> list[Any]:
        rewards: list[Any] = [None] * len(calls)
        waiting = list(range(len(calls)))[::-1]
        num_left = len(calls)
        while num_left:
            while len(self._workers) < min(self._config.workers, num_left):
                self._workers.append(_Worker(greeting))
            for worker in self._workers:
                if worker.is_ready and worker.sample is None and waiting:
                    sample = waiting.pop()
                    worker.hand_over(sample, pickle.dumps(calls[sample]), self._config.timeout_s)
            for worker in self._wait():
                if not worker.is_ready:
                    self._welcome(worker)
                    continue
                assert worker.sample is not None
                sample, worker.sample = worker.sample, None
                rewards[sample] = self._take(worker, sample, calls[sample])
                num_left -= 1
        return rewards

    def _wait(self) -> list[_Worker]:
        """Until some have answered, have ended, or are late."""
        at_work = [worker for worker in self._workers if worker.sample is not None or not worker.is_ready]
        while True:
            first = min(worker.deadline for worker in at_work)
            ready = wait(
                [worker.socket for worker in at_work],
                None if first == float("inf") else max(0.0, first - monotonic()),
            )
            found = [
                worker
                for worker in at_work
                if (worker.socket in ready and worker.listen()) or worker.deadline <= monotonic()
            ]
            if found:
                return found

    def _welcome(self, worker: _Worker) -> None:
        """It has made its imports, or could not."""
        try:
            is_well, said = worker.answer()
        except _Lost as lost:
            raise RewardError(f"A worker of the {self.reward_title} {lost} before it had a sample to score.") from None
        if not is_well:
            raise RewardError(said)
        worker.is_ready = True

    def _take(self, worker: _Worker, sample: int, call: dict[str, Any]) -> Any:
        """The reward of its sample; a worker that is lost is removed, and another will start in its place."""
        try:
            is_well, said = worker.answer()
            if is_well and said is not None:
                return said
            said = said or "answered with something other than numbers"
        except _Lost as lost:
            said = str(lost)
            self._workers.remove(worker)
            worker.end()
        sentence = f"The {self.reward_title} {said} for sample {sample}, whose prompt is {brief(call['prompts'][0])}."
        if self.fallback is None:
            raise RewardError(sentence)
        if not self._has_warned:
            name = self._config.name
            warnings.warn(f"{sentence} It gets on_failure; reward/{name}/fallbacks says how many do.", stacklevel=2)
        self._has_warned = True
        self.last_fallbacks += 1
        return self.fallback


def _end(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().end()
