"""Processes that write a checkpoint's tensors while training goes on: forked, so they have them as they were then.

megatron-core's own asynchronous save does the writing (``dist_checkpointing.save`` with ``async_sharded_save``). Here
is what it leaves to its callers and what it does not do: results that do not fill a pipe while nobody reads, checksums
of what is written, writers that do not outlive the run, and an end of waiting.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pickle
import queue
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from nemo_rlhf.parallel import manifest

_PR_SET_PDEATHSIG = 1


def _mend_reasons() -> None:
    """megatron-core from 0.17 on keeps of what went wrong with a file the type alone, where it writes it itself and not
    in a thread; what is raised it quotes."""
    original = FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(original)
    def write(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if result is not None and kwargs.get("results_queue") is None and isinstance(result[1], Exception):
            raise result[1]
        return result

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)  # type: ignore[method-assign]


_mend_reasons()


class Mailbox:
    """One message from a forked process, of any size: the interface of a queue, as far as megatron uses it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as this

    def put(self, message: Any) -> None:
        """In the place of one that is there."""
        self._file.seek(0)
        self._file.truncate()
        pickle.dump(message, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Raises queue.Empty when there is no whole message."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None


class Writer:
    """A process that writes what one call of ``dist_checkpointing.save`` has planned.

    All ranks make one, even those that have nothing to write. ``root``: the checkpoint's directory.
    """

    def __init__(self, request: AsyncRequest, root: Path) -> None:
        self._finalize, self._root = request.finalize_fns, root
        self._caller = TemporalAsyncCaller()
        with manifest.recorded() as self._ledger:
            if request.async_fn is None:
                return
            write = functools.partial(_write, request.async_fn, _tie_to(os.getpid()))
            self._caller.schedule_async_call(request._replace(async_fn=write))
        _, buckets, self._results = request.async_fn_args
        # megatron keeps the list for its length; the new process has the tensors, and this one need not hold them, nor
        # the copies on the host that megatron keeps from 0.17 on
        buckets[:] = [None] * len(buckets)
        self._caller.preloaded_holder = None

    def is_done(self) -> bool:
        """Whether this rank's process has ended, well or not."""
        process = self._caller.process
        return process is None or not process.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait until it is done; a process that takes longer is ended. ``finish`` will say so."""
        process = self._caller.process
        if process is None:
            return
        process.join(timeout_s)
        if process.is_alive():
            self.stop()
            self._results.put(RuntimeError(f"the process that wrote it had not finished after {timeout_s:.0f} s"))
        elif process.exitcode:
            self._results.put(RuntimeError(f"the process that wrote it ended with code {process.exitcode}"))

    def finish(self) -> None:
        """Complete what it wrote, all ranks together. Raises CheckpointException on all ranks if any has failed."""
        self._caller.close()
        for step in self._finalize:
            step()

    def entries(self) -> dict[str, list[int]]:
        """Size and CRC-32 of the files that this rank's process wrote, by their names in the checkpoint."""
        return self._ledger.entries(self._root)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        if self._caller.process is not None:
            self._caller.process.kill()
            self._caller.process.join()


def _write(write: Callable[..., None], tie: Callable[[], None], *args: Any) -> None:
    """In the forked process."""
    tie()
    os.register_at_fork(after_in_child=_tie_to(os.getpid()))  # megatron forks once more, a process a file
    write(*args)


def _tie_to(parent: int) -> Callable[[], None]:
    """A function that ties a forked process' life to ``parent``, where the system is Linux: a writer that a killed run
    leaves behind must not write into what the next one saves."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    libc = ctypes.CDLL(None, use_errno=True)  # now: the fork may have left the loader locked

    def tie() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return tie
