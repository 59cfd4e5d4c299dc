"""A new directory appears under its name only when it is complete, and replaces another only then."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_rlhf.config.architecture import FILE_NAME
from nemo_rlhf.convert.locate import CONFIG
from nemo_rlhf.parallel.manifest import fsync


def refuse_existing(target: Path, force: bool) -> None:
    """Raises ValueError when something is at ``target``; with ``force`` only when that is neither a model nor empty."""
    if not target.exists():
        return
    if not force:
        raise ValueError(f"{target} exists already: name a new directory, remove it, or replace it with --force.")
    is_model = (target / FILE_NAME).is_file() or (target / CONFIG).is_file()
    if not is_model and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} holds something else than a model, which is not replaced: name a new directory.")


@contextmanager
def new_directory(target: Path, force: bool, size: int) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    What a killed process left of an earlier attempt is removed first.

    Args:
        force: an existing ``target`` is replaced, once the new one is complete.
        size: bytes that will be needed.

    Raises:
        ValueError: ``target`` exists and may not be replaced, its parent cannot be written, or has too little room.
        OSError: a file could not be written; what was at ``target`` is untouched.
    """
    refuse_existing(target, force)
    target = target.absolute()
    unfinished = target.parent / f".{target.name}.unfinished"
    replaced = target.parent / f".{target.name}.replaced"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{target.parent} cannot be written to ({error.strerror}): choose another place.") from None
    try:
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise ValueError(
                f"{target} needs {size / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free: free space or choose another "
                "place."
            )
        yield unfinished
        _publish(unfinished, target, replaced)
    except OSError as error:
        free = shutil.disk_usage(target.parent).free
        raise OSError(
            f"{target} could not be written ({error}; {free / 1e9:.2f} GB were free): free space or name another "
            "directory; nothing was changed."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, target: Path, replaced: Path) -> None:
    for path in sorted(unfinished.rglob("*")):
        fsync(path)
    fsync(unfinished)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    unfinished.rename(target)
    fsync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
