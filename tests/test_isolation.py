"""People's code in the run's process: whatever it does there, the run is as if it had not."""

from __future__ import annotations

import asyncio
import builtins
import faulthandler
import gc
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_rlhf.algorithms.play import _call
from nemo_rlhf.rollout import isolation
from nemo_rlhf.rollout.isolation import copy_of, foreign, random_states, set_random_states
from nemo_rlhf.rollout.named import load_function
from nemo_rlhf.rollout.rules import exact_answer
from nemo_rlhf.rollout.score import call_metric, score
from nemo_rlhf.types import Prompt, Rollout, Sample


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts with people's code that has set nothing."""
    monkeypatch.setattr(isolation, "_theirs", [{} for _ in isolation.GROUPS])


def rollout(metadata: dict[str, Any] | None = None) -> Rollout:
    return Rollout((Sample(Prompt((5,), "one", metadata or {}), 0, (2, 3), "alpha", "eos"),))


def torch_modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.empty(1).dtype,
        torch.empty(1).device,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_anomaly_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cuda.flash_sdp_enabled(),
        bool((torch.tensor([sys.float_info.min], dtype=torch.float64) / 4 == 0).item()),
    )


def draws() -> tuple[Any, ...]:
    """Random numbers to come; drawing them changes nothing."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    found = random.random(), float(np.random.rand()), float(torch.rand(()))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return found


def streams() -> tuple[Any, ...]:
    return (sys.stdout, sys.stderr, *((os.fstat(n).st_dev, os.fstat(n).st_ino) for n in (1, 2)))


def filters() -> tuple[Any, ...]:
    return list(warnings.filters), warnings.showwarning


def logs() -> tuple[Any, ...]:
    return logging.root.level, logging.root.manager.disable, list(logging.root.handlers)


def mask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


held: list[Any] = []  # keeps what is entered and never left


def enter(context: Any) -> None:
    held.append(context)
    context.__enter__()


def turn_faulthandler() -> None:
    (faulthandler.disable if faulthandler.is_enabled() else faulthandler.enable)()


def to(path: str) -> None:
    os.chdir(path)


def die_of(number: int) -> None:
    signal.signal(number, signal.SIG_IGN)


DEEDS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "gradients off": (lambda: torch.set_grad_enabled(False), torch_modes),
    "no_grad entered": (lambda: enter(torch.no_grad()), torch_modes),
    "inference mode entered": (lambda: enter(torch.inference_mode()), torch_modes),
    "default dtype": (lambda: torch.set_default_dtype(torch.float64), torch_modes),
    "default device": (lambda: torch.set_default_device("meta"), torch_modes),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch_modes),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True, warn_only=True), torch_modes),
    "matmul precision": (lambda: torch.set_float32_matmul_precision("medium"), torch_modes),
    "anomaly mode": (lambda: torch.autograd.set_detect_anomaly(True), torch_modes),
    "autocast": (lambda: enter(torch.autocast("cpu", torch.float16)), torch_modes),
    "cudnn": (lambda: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark), torch_modes),
    "attention": (lambda: torch.backends.cuda.enable_flash_sdp(False), torch_modes),
    "denormals": (lambda: torch.set_flush_denormal(True), torch_modes),
    "directory": (lambda: to("/"), os.getcwd),
    "random drawn": (lambda: (random.random(), np.random.rand(), torch.rand(3)), draws),
    "random seeded": (lambda: (random.seed(7), np.random.seed(7), torch.manual_seed(7)), draws),
    "a stop ignored": (lambda: die_of(signal.SIGTERM), lambda: signal.getsignal(signal.SIGTERM)),
    "Ctrl-C ignored": (lambda: die_of(signal.SIGINT), lambda: signal.getsignal(signal.SIGINT)),
    "another signal": (lambda: die_of(signal.SIGALRM), lambda: signal.getsignal(signal.SIGALRM)),
    "signals blocked": (
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]),
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []),
    ),
    "alarm": (lambda: signal.alarm(1000), lambda: signal.getitimer(signal.ITIMER_REAL)),
    "variable set": (lambda: os.environ.update(CUDA_VISIBLE_DEVICES=""), lambda: dict(os.environ)),
    "variable gone": (lambda: os.environ.pop("PATH", None), lambda: dict(os.environ)),
    "environment emptied": (os.environ.clear, lambda: dict(os.environ)),
    "environment replaced": (lambda: setattr(os, "environ", {}), lambda: os.environ),
    "sys.path emptied": (sys.path.clear, lambda: list(sys.path)),
    "warnings": (lambda: warnings.simplefilter("error"), filters),
    "showwarning": (lambda: setattr(warnings, "showwarning", print), filters),
    "logging": (lambda: logging.basicConfig(level=logging.DEBUG, force=True), logs),
    "logging disabled": (logging.disable, logs),
    "locale": (lambda: locale.setlocale(locale.LC_ALL, "C"), lambda: locale.setlocale(locale.LC_ALL)),
    "umask": (lambda: os.umask(0o777), mask),
    "stdout replaced": (lambda: setattr(sys, "stdout", None), streams),
    "stderr redirected": (lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2), streams),
    "stdout's descriptor closed": (lambda: os.close(1), streams),
    "recursion limit": (lambda: sys.setrecursionlimit(400), sys.getrecursionlimit),
    "switch interval": (lambda: sys.setswitchinterval(1.0), sys.getswitchinterval),
    "socket timeout": (lambda: socket.setdefaulttimeout(0.5), socket.getdefaulttimeout),
    "gc": (gc.disable, gc.isenabled),
    "faulthandler": (turn_faulthandler, faulthandler.is_enabled),
    "start method": (
        lambda: multiprocessing.set_start_method("spawn", force=True),
        lambda: multiprocessing.get_start_method(allow_none=True),
    ),
    "excepthook": (lambda: setattr(sys, "excepthook", print), lambda: sys.excepthook),
    "a sandbox": (
        lambda: [setattr(os, name, None) for name in ("kill", "chdir", "getcwd", "remove", "umask", "fstat", "dup2")],
        lambda: (os.kill, os.chdir, os.getcwd, os.remove, os.umask, os.fstat, os.dup2),
    ),
    "open gone": (lambda: delattr(builtins, "open"), lambda: builtins.open),
    "a clock that stands still": (lambda: setattr(time, "time", lambda: 0.0), lambda: time.time),
    "temporary files elsewhere": (lambda: setattr(tempfile, "tempdir", "/nowhere"), lambda: tempfile.tempdir),
    "cores": (lambda: os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]), lambda: os.sched_getaffinity(0)),
    "errors of numpy": (lambda: np.seterr(all="raise"), np.geterr),
    "limit": (
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
        lambda: resource.getrlimit(resource.RLIMIT_NOFILE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("deed", DEEDS)
def test_what_people_s_code_does_to_the_process_is_undone(deed: str) -> None:
    do, look = DEEDS[deed]
    before = look()
    with foreign("The reward"):
        do()
    assert look() == before
    with foreign("The reward"):  # where it finds it again, and the run does not
        pass
    assert look() == before
    with pytest.raises(ValueError, match=r"The reward raised RuntimeError: no more\."), foreign("The reward"):
        do()
        raise RuntimeError("no more")
    assert look() == before
    held.clear()
    assert look() == before


def test_streams_that_were_closed_write_again(capfd: pytest.CaptureFixture[str]) -> None:
    kept = sys.stderr, sys.__stderr__
    sys.stderr = sys.__stderr__ = os.fdopen(os.dup(2), "w")
    mine = os.fdopen(2, "w", closefd=True)
    try:
        sys.stderr = mine
        with foreign("The reward"):
            sys.stderr.close()
        print("still heard", file=sys.stderr, flush=True)
    finally:
        sys.stderr, sys.__stderr__ = kept
    assert "still heard" in capfd.readouterr().err


def test_it_finds_again_what_it_has_set(tmp_path: Path) -> None:
    """A function goes on drawing its random numbers, and reads files below the directory that its module went to."""
    seen = []
    torch.manual_seed(0)
    for _ in range(3):
        with foreign("The reward"):
            seen.append((torch.is_grad_enabled(), os.getcwd(), os.environ.get("JUDGE"), random.random()))
            torch.set_grad_enabled(False)
            os.environ["JUDGE"] = "me"
            os.chdir(tmp_path)
        os.environ["RANK_OF_RUN"] = "1"  # the run goes on setting variables, which it sees
    del os.environ["RANK_OF_RUN"]
    assert [one[0] for one in seen] == [True, False, False]
    assert [one[1] for one in seen[1:]] == [str(tmp_path)] * 2
    assert [one[2] for one in seen] == [None, "me", "me"]
    assert len({one[3] for one in seen}) == 3
    with foreign("The reward"):
        assert os.environ.get("RANK_OF_RUN") is None


def test_its_random_numbers_go_on_after_a_resumption() -> None:
    def draw() -> tuple[float, float, float]:
        with foreign("The reward"):
            return random.random(), float(np.random.rand()), float(torch.rand(()))

    draw()
    states = random_states()
    expected = draw()
    draw()
    set_random_states(states)
    assert draw() == expected


def test_gradients_are_on_inside_whatever_the_run_does_just_now() -> None:
    with torch.inference_mode(), foreign("env(0)"):
        weight = torch.ones(1, requires_grad=True)
        (weight * 2).backward()
        torch.set_grad_enabled(False)
    assert weight.grad is not None
    with torch.no_grad():
        with foreign("env(0)"):
            torch.set_grad_enabled(True)
        assert not torch.is_grad_enabled()


class Quits(BaseException):
    pass


def raises(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (sys.exit, r"called sys\.exit\(None\), which may not end a run"),
        (lambda: sys.exit(3), r"called sys\.exit\(3\), which may not end a run"),
        (lambda: sys.exit("no key"), r"called sys\.exit\('no key'\), which may not end a run"),
        (lambda: os.abort(), r"called os\.abort\(\), which may not end a run"),  # noqa: PLW0108
        (lambda: os.execvp("true", ["true"]), r"called os\.execve?\(b?'"),
        (lambda: os._exit(0), r"called os\._exit\(0\), which may not end a run"),
        (raises(KeyboardInterrupt()), r"raised KeyboardInterrupt\.$"),
        (raises(GeneratorExit()), r"raised GeneratorExit\.$"),
        (raises(StopIteration("x")), r"raised StopIteration: x\.$"),
        (raises(Quits("enough")), r"raised Quits: enough\.$"),
        (lambda: pytest.fail("no"), r"raised Failed: no\.$"),
    ],
)
def test_what_would_end_the_run_is_a_sentence(end: Callable[[], Any], words: str, tmp_path: Path) -> None:
    exit_before = os._exit

    def reward(samples: list[str], **_: Any) -> list[float]:
        end()
        return [0.0] * len(samples)

    async def later(samples: list[str], **_: Any) -> list[float]:
        end()
        return [0.0] * len(samples)

    with pytest.raises(ValueError, match=f"The reward function .*reward {words}"):
        score(reward, rollout(), None)
    with pytest.raises(ValueError, match=f"The metric function .*reward {words}"):
        call_metric(reward, rollout(), None)
    with pytest.raises(ValueError, match=f"^step\\(\\) of environment 3 {words}"):
        _call("step() of environment 3", end)
    if "os" not in words and "StopIteration" not in words:
        with pytest.raises(ValueError, match=f"later {words}"):
            score(later, rollout(), None)
    assert os._exit is exit_before


@pytest.mark.parametrize("way", ["_exit", "abort", "execv"])
def test_a_coroutine_cannot_end_the_run_either(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: Any) -> None:
        raise Quits("this process would have ended")

    monkeypatch.setattr(os, way, ended)
    monkeypatch.setitem(isolation._WAYS_OUT, way, ended)

    async def reward(**_: Any) -> list[float]:
        await asyncio.sleep(0)
        getattr(os, way)("x")
        return [1.0]

    with pytest.raises(ValueError, match=rf"\.reward called os\.{way}\('x'\), which may not end a run"):
        score(reward, rollout(), None)
    assert not isolation._threads


def test_an_error_that_cannot_say_what_it_is() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    with pytest.raises(ValueError, match=r"^The reward raised Mute\.$"), foreign("The reward"):
        raise Mute


def test_ctrl_c_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt), foreign("The reward"):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_it_forks_may_end() -> None:
    with foreign("The reward"):
        worker = multiprocessing.get_context("fork").Process(target=os._exit, args=(5,))
        worker.start()
        worker.join()
    assert worker.exitcode == 5


@pytest.mark.parametrize(("end", "code"), [(lambda: None, 0), (lambda: sys.exit(4), 4), (lambda: 1 / 0, 1)])
def test_a_process_that_it_forks_does_not_go_on_with_the_run(end: Callable[[], Any], code: int) -> None:
    child, here = 0, os.getpid()
    try:
        with foreign("The reward"):
            child = os.fork()
            if child == 0:
                end()
    finally:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)  # it has come here, which it must not
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_torch_distributed_is_the_run_s(monkeypatch: pytest.MonkeyPatch) -> None:
    now = torch.distributed.is_initialized()
    with pytest.raises(ValueError, match=r"torch\.distributed was started or ended"), foreign("The reward"):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: not now)


def test_objects_that_it_is_handed_are_copies() -> None:
    class Tokenizer:
        def __init__(self) -> None:
            self.padding_side, self.added = "right", ["<eos>"]

    metadata = {"answers": ["one"], "rest": {"deep": [1]}, "lock": threading.Lock()}
    given, tokenizer = rollout(metadata), Tokenizer()

    def reward(tokenizer: Any, answers: Any, rest: Any, output_ids: Any, samples: Any, **_: Any) -> list[float]:
        assert answers == [["one"]] and rest == [{"deep": [1]}]
        answers[0].clear()
        answers.clear()
        rest[0]["deep"].append(2)
        output_ids[0].clear()
        samples.clear()
        tokenizer.padding_side = "left"
        tokenizer.added.clear()
        return [1.0]

    for _ in range(2):
        assert score(reward, given, tokenizer).scores.tolist() == [1.0]
    assert (metadata["answers"], metadata["rest"]) == (["one"], {"deep": [1]})
    assert given.samples[0].response_ids == (2, 3)
    assert (tokenizer.padding_side, tokenizer.added) == ("right", ["<eos>"])
    assert copy_of(tokenizer) is copy_of(tokenizer)
    lock = threading.Lock()
    assert copy_of(lock) is lock


def test_only_people_s_code_in_this_process_is_handed_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[Any] = []
    monkeypatch.setattr("nemo_rlhf.rollout.score.copied", lambda thing: handed.append(thing) or thing)
    given = rollout({"answer": "one"})

    class Service:
        reward_title = "reward service"

        def __call__(self, samples: list[str], **_: Any) -> list[float]:
            return [1.0]

    score(Service(), given, None)
    score(exact_answer, given, None)
    score(partial(exact_answer, field="answer"), given, None)
    assert handed == []
    score(lambda samples, **_: [1.0], given, None)
    assert handed == ["one"]


MODULE = """
import os, random, signal, sys, torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.bfloat16)
random.seed(0)
torch.manual_seed(0)
os.chdir("/")
os.environ["FROM_MODULE"] = "1"
signal.signal(signal.SIGTERM, signal.SIG_DFL)
sys.path.insert(0, "/lazily")
def reward(samples, **_):
    assert os.getcwd() == "/" and os.environ["FROM_MODULE"] == "1" and not torch.is_grad_enabled()
    assert "/lazily" in sys.path
    return [1.0] * len(samples)
"""


def test_importing_a_module_is_its_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = torch_modes(), draws(), os.getcwd(), dict(os.environ), signal.getsignal(signal.SIGTERM), sys.path[0]
    (tmp_path / "unruly_reward.py").write_text(MODULE)
    (tmp_path / "quitting_reward.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "leaving_reward.py").write_text("import os\nos._exit(3)\n")
    function = load_function("unruly_reward:reward")
    assert score(function, rollout(), None).scores.tolist() == [1.0]
    after = torch_modes(), draws(), os.getcwd(), dict(os.environ), signal.getsignal(signal.SIGTERM), sys.path[0]
    assert after == before
    for name, deed in (("quitting_reward", "sys.exit"), ("leaving_reward", "os._exit")):
        with pytest.raises(
            ValueError, match=rf'^reward.function is "{name}:f", and importing {name} called {deed}\(3\)'
        ):
            load_function(f"{name}:f")


def test_a_rank_begins_with_modes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script did for a model of its own, before it called ``nemo_rlhf.train``, is not the run's."""
    from nemo_rlhf.cli import rank
    from nemo_rlhf.config.schema import HardwareConfig, ModelConfig

    for owner, name in ((rank.state, "initialize"), (rank.watch, "start"), (rank.atexit, "register")):
        monkeypatch.setattr(owner, name, lambda *_, **__: None)
    monkeypatch.setattr(rank.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(rank, "kernels", lambda *_: "stubs")
    environment, before = dict(os.environ), torch_modes()
    with warnings.catch_warnings():
        try:
            torch.set_grad_enabled(False)
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            rank.begin(ModelConfig(), HardwareConfig(), 0)
            assert torch.is_grad_enabled()
            assert (torch.empty(1).dtype, torch.empty(1).device.type) == (torch.float32, "cpu")
        finally:
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
    assert torch_modes() == before


def test_a_limit_that_is_gone_for_good_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise ValueError("not allowed to raise maximum limit")

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft_now - 1, hard_now))

    soft_now, hard_now = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft_now < 1:
        soft_now = 100_000
    with pytest.raises(ValueError, match=r"RLIMIT_NPROC\) was lowered .* workers"), foreign("The reward"):
        lower()
        monkeypatch.setattr(resource, "setrlimit", refused)
    monkeypatch.undo()
    resource.setrlimit(resource.RLIMIT_NPROC, (soft_now if hard_now != -1 else -1, hard_now))


def test_it_costs_little() -> None:
    """Environments are called once a turn."""
    with foreign("env"):
        random.random()
    start = time.perf_counter()
    for _ in range(200):
        with foreign("env"):
            pass
    assert (time.perf_counter() - start) / 200 < 5e-3
