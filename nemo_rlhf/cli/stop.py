"""Signals that ask a run to stop: noted from the moment a rank starts, long before there is a step to finish."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_number = 0  # of the signal that was noted
_depth = 0  # heeded() within heeded(): what came before is not forgotten


def noted() -> bool:
    """Whether this process was asked to stop since ``heeded`` was entered."""
    return bool(_number)


def number() -> int:
    """The signal that ``noted`` is about; 0 without one."""
    return _number


def listen() -> None:
    """Note the signals from now on; for the use of ``heeded``, and where a library has put its own handlers since."""
    if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
        for number in STOP_SIGNALS:
            signal.signal(number, _note)


@contextmanager
def heeded() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 do not end the process but are noted."""
    global _depth, _number
    _depth += 1
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    listen()
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            _number = 0
        if threading.current_thread() is threading.main_thread():
            for number, handler in previous.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _note(number: int, frame: Any) -> None:
    global _number
    _number = number
