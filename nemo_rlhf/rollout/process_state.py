"""What code can change of the process that it runs in: ``GROUPS`` of settings, each read as a dict and set by one.

Imports nothing heavy; what belongs to torch and numpy is looked at where they are loaded.
"""

from __future__ import annotations

import builtins
import faulthandler
import gc
import json
import locale
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

State = dict[Any, Any]
Item = tuple[Callable[[], Any], Callable[[Any], Any]]  # how to read it, how to set it

# Bound now: code that sandboxes its process sets os.chdir = None, and the like.
_chdir, _close, _dup, _dup2, _fstat, _getcwd, _umask = (
    os.chdir,
    os.close,
    os.dup,
    os.dup2,
    os.fstat,
    os.getcwd,
    os.umask,
)
_environ = os.environ
_MODULES = (builtins, os, shutil, subprocess, signal, random, json, time, tempfile)  # that sandboxes and mocks change
_OF_SYS = ("stdin", "stdout", "stderr", "__stdout__", "__stderr__", "excepthook", "unraisablehook", "argv", "exit")
_LIMITS = ("AS", "DATA", "STACK", "CPU", "FSIZE", "NOFILE", "NPROC")
_SIGNALS = [number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)]
_STREAMS = (("stdout", 1), ("stderr", 2))


class Items:
    """Settings that have names only here."""

    may_grow = False

    def __init__(self, items: Callable[[], Mapping[str, Item]]) -> None:
        self._items = items

    def read(self) -> State:
        return {name: read() for name, (read, _) in self._items().items()}

    def write(self, values: Mapping[str, Any]) -> None:
        items = self._items()
        for name, value in values.items():
            items[name][1](value)


class Attributes:
    """Attributes of a module. New ones stay, since they may be submodules that somebody has imported."""

    may_grow = False

    def __init__(self, module: Any, names: tuple[str, ...] = ()) -> None:
        self._module, self._names = module, names

    def read(self) -> State:
        found = vars(self._module)
        return {name: found.get(name) for name in self._names} if self._names else dict(found)

    def write(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if value is not None or hasattr(self._module, name):
                setattr(self._module, name, value)


class Environment:
    """Environment variables; None stands for one that is not set."""

    may_grow = True

    def read(self) -> State:
        return dict(_environ)

    def write(self, values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                _environ.pop(name, None)
            else:
                _environ[name] = value


class Path:
    """Where modules are looked for. What was added stays, behind the rest, for what is imported later."""

    may_grow = False

    def read(self) -> State:
        return {"path": list(sys.path)}

    def write(self, values: Mapping[str, list[str]]) -> None:
        first = values["path"]
        sys.path[:] = [*first, *(place for place in sys.path if place not in first)]


class Signals:
    """Handlers of signals; what no Python code has set (None) no Python code can set again."""

    may_grow = False

    def read(self) -> State:
        return {number: signal.getsignal(number) for number in _SIGNALS}

    def write(self, values: Mapping[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number, handler in values.items():
                if handler is not None:
                    signal.signal(number, handler)


def _directory() -> str | None:
    with suppress(FileNotFoundError):  # it was deleted
        return _getcwd()
    return None


def _go_to(directory: str | None) -> None:
    if directory is not None:
        with suppress(FileNotFoundError):
            _chdir(directory)


def _read_umask() -> int:
    mask = _umask(0o077)  # for the moment that it takes, other threads make private files rather than open ones
    _umask(mask)
    return mask


def _read_warnings() -> tuple[list[Any], Any, Any]:
    return list(warnings.filters), warnings.showwarning, warnings.formatwarning


def _write_warnings(kept: tuple[list[Any], Any, Any]) -> None:
    warnings.resetwarnings()  # it also tells modules that what they remember of the filters is out of date
    warnings.filters[:], warnings.showwarning, warnings.formatwarning = kept  # type: ignore[index]


def _read_logging() -> tuple[int, int, list[Any]]:
    return logging.root.level, logging.root.manager.disable, list(logging.root.handlers)


def _write_logging(kept: tuple[int, int, list[Any]]) -> None:
    level, disabled, logging.root.handlers[:] = kept
    logging.root.setLevel(level)
    logging.disable(disabled)


def _set_faulthandler(enabled: bool) -> None:
    if not enabled:
        faulthandler.disable()
    elif sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)


_OF_PYTHON: dict[str, Item] = {
    "directory": (_directory, _go_to),
    "umask": (_read_umask, _umask),
    "timer": (
        lambda: bool(signal.getitimer(signal.ITIMER_REAL)[0]),
        lambda runs: None if runs else signal.setitimer(signal.ITIMER_REAL, 0),
    ),
    "blocked signals": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []),
        partial(signal.pthread_sigmask, signal.SIG_SETMASK),
    ),
    "warnings": (_read_warnings, _write_warnings),
    "logging": (_read_logging, _write_logging),
    "locale": (lambda: locale.setlocale(locale.LC_ALL), lambda kept: locale.setlocale(locale.LC_ALL, kept)),
    "recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "switch interval": (sys.getswitchinterval, sys.setswitchinterval),
    "socket timeout": (socket.getdefaulttimeout, socket.setdefaulttimeout),
    "garbage collection": (gc.isenabled, lambda enabled: gc.enable() if enabled else gc.disable()),
    "faulthandler": (faulthandler.is_enabled, _set_faulthandler),
    "start method": (
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda kept: multiprocessing.set_start_method(kept, force=True),
    ),
    "random numbers": (random.getstate, random.setstate),
}
if hasattr(os, "sched_getaffinity"):
    _OF_PYTHON["cores"] = (partial(os.sched_getaffinity, 0), partial(os.sched_setaffinity, 0))


def _numpy_items() -> Mapping[str, Item]:
    if "numpy.random" not in sys.modules:
        return {}
    from numpy import asarray, frombuffer, geterr, random, seterr, uint32

    def read() -> tuple[Any, ...]:
        kind, words, *rest = random.get_state(legacy=True)
        return (kind, asarray(words).tobytes(), *rest)  # arrays do not compare as one value

    def write(kept: tuple[Any, ...]) -> None:
        random.set_state((kept[0], frombuffer(kept[1], dtype=uint32), *kept[2:]))

    return {"random numbers of numpy": (read, write), "errors of numpy": (geterr, lambda kept: seterr(**kept))}


def _torch_items() -> Mapping[str, Item]:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "set_float32_matmul_precision"):  # half imported
        return {}
    items = _items_of_torch()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        items = {
            **items,
            "device": (torch.cuda.current_device, torch.cuda.set_device),
            "random numbers of the device": (lambda: _bytes(torch.cuda.get_rng_state()), _set_cuda_random),
        }
    return items


@cache
def _items_of_torch() -> Mapping[str, Item]:
    import torch

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn

    def attribute(owner: Any, name: str) -> Item:
        return partial(getattr, owner, name), partial(setattr, owner, name)

    items: dict[str, Item] = {
        "default device": (
            torch.get_default_device,
            lambda kept: torch.set_default_device(None if kept.type == "cpu" else kept),
        ),
        "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
        "anomaly mode": (
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda kept: torch.set_anomaly_enabled(*kept),
        ),
        "deterministic": (
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda kept: torch.use_deterministic_algorithms(kept[0], warn_only=kept[1]),
        ),
        "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        "threads": (torch.get_num_threads, torch.set_num_threads),
        "denormals": (lambda: _SMALLEST / 4 == 0.0, torch.set_flush_denormal),
        "flash": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "memory efficient": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        "math": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        **{f"cudnn.{name}": attribute(cudnn, name) for name in ("enabled", "benchmark", "deterministic")},
        "autocast cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        "random numbers of torch": (
            lambda: _bytes(torch.get_rng_state()),
            lambda kept: torch.set_rng_state(_tensor(kept)),
        ),
    }
    for device in ("cpu", "cuda"):
        items[f"autocast {device}"] = (
            partial(torch.is_autocast_enabled, device),
            partial(torch.set_autocast_enabled, device),
        )
        items[f"autocast dtype {device}"] = (
            partial(torch.get_autocast_dtype, device),
            partial(torch.set_autocast_dtype, device),
        )
    return items


_SMALLEST = sys.float_info.min  # a quarter of it is 0 where the processor flushes such numbers


def _bytes(tensor: Any) -> bytes:
    return bytes(tensor.numpy().data)


def _tensor(kept: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(kept), dtype=torch.uint8)


def _set_cuda_random(kept: bytes) -> None:
    sys.modules["torch"].cuda.set_rng_state(_tensor(kept))


def _limit(name: str) -> Item:
    number = getattr(resource, f"RLIMIT_{name}")

    def write(kept: tuple[int, int]) -> None:
        try:
            resource.setrlimit(number, kept)
        except (ValueError, OSError):
            _, hard = resource.getrlimit(number)
            raise ValueError(
                f"a limit of the run's process (RLIMIT_{name}) was lowered to {hard}, and cannot be raised again: let "
                "this code run in processes of its own (reward.sources with workers)."
            ) from None

    return partial(resource.getrlimit, number), write


def _groups_of_processes() -> Mapping[str, Item]:
    distributed = sys.modules.get("torch.distributed")
    if not hasattr(distributed, "is_initialized"):
        return {}

    def refuse(_: bool) -> None:
        raise ValueError(
            "torch.distributed was started or ended, which is the run's: let this code run in processes of its own "
            "(reward.sources with workers)."
        )

    return {"torch.distributed": (distributed.is_initialized, refuse)}  # type: ignore[union-attr]


_LIMIT_ITEMS = {name: _limit(name) for name in _LIMITS}
# Modules come first: what puts the others back needs them. What may be gone for good comes last.
GROUPS: tuple[Any, ...] = (
    *map(Attributes, _MODULES),
    Attributes(sys, _OF_SYS),
    Environment(),
    Path(),
    Signals(),
    Items(_torch_items),
    Items(lambda: _OF_PYTHON),
    Items(_numpy_items),
    Items(lambda: _LIMIT_ITEMS),
    Items(_groups_of_processes),
)


@contextmanager
def streams_kept() -> Iterator[None]:
    """Afterwards stdout and stderr lead where they led before, though code inside has closed or replaced them."""
    kept = []
    for name, number in _STREAMS:
        with suppress(OSError):  # the run has none
            kept.append((name, number, _dup(number), _fstat(number)))
    try:
        yield
    finally:
        for name, number, spare, before in kept:
            if not _is_same(number, before):
                _dup2(spare, number)
            _close(spare)
            for attribute in (name, f"__{name}__"):
                if getattr(getattr(sys, attribute), "closed", False):
                    reopened = open(number, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
                    setattr(sys, attribute, reopened)


def _is_same(number: int, before: os.stat_result) -> bool:
    with suppress(OSError):
        now = _fstat(number)
        return (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
    return False
