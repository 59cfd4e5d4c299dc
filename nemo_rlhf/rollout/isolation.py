"""People's code in the run's process: reward functions, metrics, environments, and the import of their modules.

All of it goes through ``foreign``. Whatever it changes of the process it finds again when it is next called, and the
run never sees: two worlds that share a process. It may draw random numbers, change the directory or torch's modes, and
it cannot end the run but with a sentence.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from nemo_rlhf.rollout.process_state import GROUPS, State, streams_kept
from nemo_rlhf.rollout.words import one_line

_KEPT_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # the run hears them whatever people's code sets
_RANDOM = ("random numbers", "random numbers of numpy", "random numbers of torch")
_theirs: list[State] = [{} for _ in GROUPS]  # what people's code has set, and the run has not
_is_inside = False
_copies: dict[int, tuple[Any, Any]] = {}
_threads: set[int] = set()  # in which code of the call that goes on runs
_interrupts: list[int] = []  # of the call that goes on: it was Ctrl-C, and no exception that code has made
_WAYS_OUT = {name: getattr(os, name) for name in ("_exit", "abort", "execv", "execve")}


class _Ended(BaseException):
    """People's code has called what would end the process."""


@contextmanager
def isolated() -> Iterator[None]:
    """Around people's code, or around many calls of it: its world, and afterwards the run's again."""
    if _is_inside:  # it has called what calls it
        yield
        return
    _interrupts.clear()
    with _no_inference_mode(), streams_kept(), _two_worlds(), _no_way_out():
        yield


@contextmanager
def foreign(what: str, passing: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Runs people's code, which sentences name as ``what``. Exceptions of the kinds in ``passing`` pass as they are.

    Raises:
        ValueError: it raised anything else, or tried to end the process.
        KeyboardInterrupt: somebody has pressed Ctrl-C.
    """
    try:
        with isolated():
            yield
    except passing:
        raise
    except BaseException as error:
        if _interrupts and isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{what} {_deed(error)}.") from error


@contextmanager
def no_way_out_here() -> Iterator[None]:
    """Around people's code in a thread that the call has started for it: it cannot end the run from there, either."""
    thread = threading.get_ident()
    _threads.add(thread)
    try:
        yield
    finally:
        _threads.discard(thread)


def copied(thing: Any) -> Any:
    """A copy to hand to people's code, which may change it; where it cannot be copied, it itself."""
    try:
        return copy.deepcopy(thing)
    except Exception:  # whatever a class of somebody's raises
        return thing


def copy_of(tokenizer: Any) -> Any:
    """The same, made once: copying a large vocabulary takes long."""
    kept = _copies.get(id(tokenizer))
    if kept is None or kept[0] is not tokenizer:
        _copies.clear()
        kept = _copies[id(tokenizer)] = tokenizer, copied(tokenizer)
    return kept[1]


def random_states() -> dict[str, Any]:
    """How far people's random numbers are, for a checkpoint."""
    return {name: value for state in _theirs for name, value in state.items() if name in _RANDOM}


def set_random_states(states: dict[str, Any]) -> None:
    """What ``random_states`` gave."""
    for group, state in zip(GROUPS, _theirs, strict=True):
        known = group.read() if states else {}
        state.update({name: value for name, value in states.items() if name in known})


def _deed(error: BaseException) -> str:
    if isinstance(error, SystemExit | _Ended):
        call = str(error) if isinstance(error, _Ended) else f"sys.exit({error.code!r})"
        return f"called {call}, which may not end a run: let it return, or raise an error that says why"
    return f"raised {one_line(error)}"


def _no_inference_mode() -> AbstractContextManager[Any]:
    torch: Any = sys.modules.get("torch")
    return torch.inference_mode(False) if hasattr(torch, "inference_mode") else nullcontext()


@contextmanager
def _two_worlds() -> Iterator[None]:
    global _is_inside
    before = [group.read() for group in GROUPS]
    for group, theirs in zip(GROUPS, _theirs, strict=True):
        if theirs:
            group.write({name: value for name, value in theirs.items() if name not in _KEPT_SIGNALS})
    _is_inside = True
    try:
        yield
    finally:
        _is_inside = False
        for group, ours, theirs in zip(GROUPS, before, _theirs, strict=True):
            _part(group, ours, theirs)


def _part(group: Any, ours: State, theirs: State) -> None:
    """Put back what is ours, and remember what is theirs."""
    now = group.read()
    theirs.clear()
    if now == ours:
        return
    names = {name for name in (ours | now if group.may_grow else ours) if not _is_same(ours.get(name), now.get(name))}
    theirs.update({name: now.get(name) for name in names})
    group.write({name: ours.get(name) for name in names})


def _is_same(one: Any, other: Any) -> bool:
    return one is other or bool(one == other)


@contextmanager
def _no_way_out() -> Iterator[None]:
    """Inside, what would end this process or put another program in its place raises, and Ctrl-C is noted. A process
    that people's code has forked, and that comes back, ends here: there is one run."""
    process, thread = os.getpid(), threading.get_ident()

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*arguments: Any) -> Any:
            if os.getpid() == process and threading.get_ident() in _threads:
                raise _Ended(f"os.{name}({', '.join(map(repr, arguments[:1]))})")
            return _WAYS_OUT[name](*arguments)  # in a process that it has forked, or of the run's own threads

        return refuse

    def interrupt(number: int, frame: Any) -> None:
        _interrupts.append(number)
        raise KeyboardInterrupt

    listens = thread == threading.main_thread().ident and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if listens:
        signal.signal(signal.SIGINT, interrupt)
    refusals = {name: refusing(name) for name in _WAYS_OUT}
    for name, refusal in refusals.items():
        setattr(os, name, refusal)
    code: Any = 0
    try:
        with no_way_out_here():
            yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        raise
    finally:
        if os.getpid() != process:
            _WAYS_OUT["_exit"](code if isinstance(code, int) else int(code is not None))
        for name, refusal in refusals.items():
            if getattr(os, name, None) is refusal:
                setattr(os, name, _WAYS_OUT[name])
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
