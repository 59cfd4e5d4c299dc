"""Files that several processes may want to write: one at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Write ``target`` without another process that does the same; its names for what is not yet whole are the same.

    The lock is that of a file beside ``target``, and ends with its process. A file system without locks has none.

    Raises:
        ValueError: another process is writing ``target``, or nothing can be written there.
    """
    path = target.with_name(f".{target.name}.lock")
    file = _opened(path, target)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def _opened(path: Path, target: Path) -> int:
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ValueError(f"{path.parent} cannot be written to ({error.strerror}): choose another place.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise ValueError(f"{target} is being written by another process: wait for it, or name another.") from None
        except OSError:  # no locks here
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file)):
                return file
        os.close(file)  # whoever had it has deleted it since it was opened
