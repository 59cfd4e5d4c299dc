"""Who writes a run's checkpoints: the ranks themselves, or processes beside them while training goes on.

Either way a directory gets its name when every rank has written and checked its part, and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from nemo_rlhf import device
from nemo_rlhf.parallel import checkpoint
from nemo_rlhf.parallel.writers import Writer


class Saver:
    """``pending``: the checkpoint that is being written, None when there is none. All ranks call every method but
    ``abandon``, in the same order.
    """

    def __init__(self, in_background: bool, timeout_s: float) -> None:
        """``timeout_s``: how long ranks wait for each other."""
        self._in_background, self._timeout_s = in_background, timeout_s
        self._writers: list[Writer] = []
        self.pending: Path | None = None

    def save(self, path: Path, write: Callable[[Path], None]) -> None:
        """As ``checkpoint.write_atomically``; in the background, it returns when everything to be written is in other
        processes. It waits for the checkpoint before.

        Raises:
            SaveError: on every rank, when this checkpoint, or the one before, could not be written.
        """
        if not self._in_background:
            checkpoint.write_atomically(path, write)
            return
        self.wait()
        with checkpoint.told_as_save_error(path):
            partial = checkpoint.begin(path)
            try:
                with checkpoint.handed_over(lambda request: self._writers.append(Writer(request, partial))):
                    checkpoint.together(lambda: write(partial), path.parent)
            except BaseException:
                self.abandon()
                raise
        self.pending = path

    def poll(self) -> bool:
        """Give the pending checkpoint its name if all ranks have written it; whether that happened now.

        Raises:
            SaveError: on every rank, when any of them failed to write it.
        """
        if self.pending is None:
            return False
        done = torch.tensor(float(all(writer.is_done() for writer in self._writers)), device=device.torch_device())
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return self.wait() if done else False

    def wait(self) -> bool:
        """The same, however long it takes; whether there was one. Raises SaveError as ``poll``."""
        if self.pending is None:
            return False
        path, writers = self.pending, self._writers
        self.pending, self._writers = None, []
        for writer in writers:
            writer.join(self._timeout_s / 2)  # less than other ranks wait for this one

        def finish() -> None:
            for writer in writers:
                writer.finish()

        with checkpoint.told_as_save_error(path):
            checkpoint.together(finish, path.parent)
            checkpoint.complete(path, {name: entry for writer in writers for name, entry in writer.entries().items()})
        return True

    def abandon(self) -> None:
        """End this rank's writers and forget the pending checkpoint, of which no rank will give it its name."""
        for writer in self._writers:
            writer.stop()
        self.pending, self._writers = None, []
