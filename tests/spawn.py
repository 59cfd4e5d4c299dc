"""Run a function on several ranks, each a process of its own, and collect what it returns.

Ranks are forks of a process that has imported the package and done nothing else: an import takes longer than most
tests. Never forks of the process that runs the tests, so neither megatron's global state nor torch's process groups
travel from the one to the other.

    def worker(payload): ...                # in tests/workers/some_worker.py; sees RANK, WORLD_SIZE, MASTER_* as usual
    results = run_distributed("tests.workers.some_worker:worker", world_size=2, payload={"steps": 3})

Payload and results travel as pickles, so tensors in them arrive on the CPU and unshared.
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["nemo_rlhf.cli.run", "transformers.models.llama.modeling_llama"])
_FOR_ALL = {
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
}
_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0  # how long the other ranks may go on after the first has failed, to write their own tracebacks


class DistributedFailure(AssertionError):
    """A rank raised, died or ran out of time; the message holds the traceback of the first that did."""


def run_distributed(
    worker: str, world_size: int, payload: Any = None, *, timeout_s: float = 600.0, env: dict[str, str] | None = None
) -> list[Any]:
    """Call ``worker`` ("module:function") with ``payload`` on ``world_size`` ranks; return its results by rank.

    Raises DistributedFailure with the traceback of the first failing rank, or the output's end where a rank died
    or was still running after ``timeout_s``. No process outlives the call.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name, turn():
        directory = Path(name)
        _dump(payload, directory / "payload")
        shared = rank_environment(world_size) | (env or {})
        processes = [_start(worker, rank, directory, shared, timeout_s) for rank in range(world_size)]
        try:
            _wait(processes, directory, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [_load(directory / f"result-{rank}") for rank in range(world_size)]


@contextmanager
def turn() -> Iterator[None]:
    """Test files run side by side, but groups of ranks one after the other: two of them on the same cores wait for each
    other at every collective."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    with (Path(tempfile.gettempdir()) / f"nemo_rlhf-{run}.turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def rank_environment(world_size: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        **os.environ,
        **_FOR_ALL,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _start(worker: str, rank: int, directory: Path, shared: dict[str, str], timeout_s: float) -> ForkServerProcess:
    env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    process = _FORKS.Process(target=_main, args=(worker, directory, env, timeout_s))
    with _environ(_FOR_ALL):  # the first one starts the server, which keeps what it finds
        process.start()
    return process


@contextmanager
def _environ(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _wait(processes: list[ForkServerProcess], directory: Path, deadline: float, timeout_s: float) -> None:
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _GRACE_S)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    if not any(code != 0 for code in codes):
        return
    errors = sorted(directory.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        rank, text = errors[0].name.removeprefix("error-"), errors[0].read_text()
        raise DistributedFailure(f"Rank {rank} of {len(processes)} raised first:\n{text}")
    dead = next((rank for rank, code in enumerate(codes) if code), None)
    if dead is not None:
        raise DistributedFailure(f"Rank {dead} of {len(processes)} died ({codes[dead]}):\n{_tail(directory, dead)}")
    late = next(rank for rank, code in enumerate(codes) if code is None)
    raise DistributedFailure(
        f"Rank {late} of {len(processes)} was still running after {timeout_s:.0f} s:\n{_tail(directory, late)}"
    )


def _tail(directory: Path, rank: int, characters: int = 4000) -> str:
    return (directory / f"output-{rank}").read_text(errors="replace")[-characters:]


def _dump(value: Any, path: Path) -> None:
    # torch.save, because plain pickle hands tensors over with the whole storage that they are a view of
    buffer = io.BytesIO()
    torch.save(value, buffer, pickle_module=pickle)
    path.write_bytes(buffer.getvalue())


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=False)


def _main(worker: str, directory: Path, env: dict[str, str], timeout_s: float) -> None:
    """The life of a rank; ``env`` is its whole environment. Shortly before its time is up it says where it is."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nothing goes on when the tests have been killed
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    rank = env["RANK"]
    output = os.open(directory / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(0.9 * timeout_s, file=output)
    try:
        module, function = worker.split(":")
        torch.set_num_threads(1)
        result = getattr(importlib.import_module(module), function)(_load(directory / "payload"))
        _dump(result, directory / f"result-{rank}")
    except BaseException:
        (directory / f"error-{rank}").write_text(traceback.format_exc())
        raise
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
