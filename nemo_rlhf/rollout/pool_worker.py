"""The process that runs a reward function for one sample at a time: ``python -m nemo_rlhf.rollout.pool_worker FD``.

A program of its own, rather than a fork or a spawned copy of the run: a fork would share the run's devices and groups,
and a spawned process would import the user's script again.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import json
import os
import pickle
import signal
import socket
import sys
from functools import partial
from io import BufferedRWPair
from typing import Any

from nemo_rlhf.rollout.named import load_function
from nemo_rlhf.rollout.words import brief, one_line, plain

_PR_SET_PDEATHSIG = 1


def main(stream: BufferedRWPair) -> None:
    """Read the function from ``stream``, then samples until the other end closes; answer each with a line of JSON:
    [true, reward] or [false, what was wrong]."""
    name, arguments, tokenizer = pickle.load(stream)
    try:
        function = partial(load_function(name), **arguments)
    except ValueError as error:
        _say(stream, False, str(error))
        return
    _say(stream, True, None)
    while True:
        try:
            given: dict[str, Any] = pickle.load(stream)
        except EOFError:
            return
        if tokenizer is not None:
            given["tokenizer"] = tokenizer
        _say(stream, *_answer(function, given))


def _say(stream: BufferedRWPair, is_well: bool, what: Any) -> None:
    stream.write(json.dumps([is_well, what]).encode() + b"\n")
    stream.flush()


def _answer(function: Any, given: dict[str, Any]) -> tuple[bool, Any]:
    try:
        returned = function(**given)
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        rewards = plain(returned)
        reward = plain(rewards[0]) if isinstance(rewards, (list, tuple)) and len(rewards) == 1 else None
        if isinstance(reward, (list, tuple)):
            reward = [plain(value) for value in reward]
    except Exception as error:  # whatever the user's function raises
        return False, f"raised {one_line(error)}"
    values: list[Any] = reward if isinstance(reward, list) else [reward]
    if not all(isinstance(value, (int, float)) for value in values):
        return False, f"returned {brief(returned)}, and must return a list with one reward,"
    try:
        numbers = [float(value) for value in values]
    except OverflowError:
        return False, "returned a whole number that is larger than any float"
    return True, numbers if isinstance(reward, list) else numbers[0]


def _die_with(parent: int) -> None:
    """Tie this process' life to the run's, where the system is Linux. What the user's function has started itself is
    not tied: after a SIGKILL of the run it may go on."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


if __name__ == "__main__":
    _die_with(int(sys.argv[2]))
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):  # they are the run's business
        signal.signal(number, signal.SIG_IGN)
    main(socket.socket(fileno=int(sys.argv[1])).makefile("rwb"))
