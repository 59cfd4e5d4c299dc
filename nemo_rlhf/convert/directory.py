"""A new directory appears under its name only when it is complete, and replaces another only then."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_rlhf.config.architecture import FILE_NAME
from nemo_rlhf.convert.locate import CONFIG, TOKENIZER
from nemo_rlhf.files import alone
from nemo_rlhf.parallel.manifest import MANIFEST, fsync
from nemo_rlhf.untrusted import read_json, stranger

# what transformers writes for a tokenizer, whichever its kind
TOKENIZER_FILES = (
    "tokenizer*",
    "tokenization_*.py",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
GENERATION_CONFIG = "generation_config.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_HF = (CONFIG, GENERATION_CONFIG, *_WEIGHTS, *TOKENIZER_FILES)
_MODEL = (
    *_HF,
    *(f"value_trunk/{pattern}" for pattern in _HF),
    *(f"{TOKENIZER}/{pattern}" for pattern in _HF),
    *(f"weights/{pattern}" for pattern in (".metadata", "metadata.json", "common.pt", "*.distcp")),
    FILE_NAME,
    MANIFEST,
)


def check_target(target: Path, source: Path, force: bool) -> None:
    """See whether a directory made of ``source`` may be put at ``target``.

    Raises:
        ValueError: it may not: something is there and ``force`` is not given, or what is there is no model or not only
            one; ``target`` is a link, or one of the two directories lies in the other.
    """
    if target.is_symlink():
        raise ValueError(f"{target} is a link to {target.readlink()}: name the directory itself, or a new one.")
    whole, origin = target.resolve(), source.resolve()
    if whole == origin or whole in origin.parents or origin in whole.parents:
        raise ValueError(f"{target} and {source}, which is read, lie in each other: name another directory.")
    if not target.exists():
        return
    if not force:
        raise ValueError(f"{target} exists already: name a new directory, remove it, or replace it with --force.")
    if not target.is_dir():
        raise ValueError(f"{target} holds something else than a model, which is not replaced: name a new directory.")
    if Path.cwd().is_relative_to(whole):
        raise ValueError(f"{target} is where this command runs, which is not replaced: name another directory.")
    if any(target.iterdir()) and not _is_model(target):
        raise ValueError(f"{target} holds something else than a model, which is not replaced: name a new directory.")
    if (other := stranger(target, _MODEL)) is not None:
        raise ValueError(
            f"{target} holds {other} beside a model, and is not replaced with it: move that away, or name a new "
            "directory."
        )


def _is_model(directory: Path) -> bool:
    if (directory / FILE_NAME).is_file():
        return True
    try:
        return bool(read_json(directory / CONFIG).get("architectures"))
    except ValueError:
        return False


@contextmanager
def new_directory(target: Path, source: Path, force: bool, size: int) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    What a killed process left of an earlier attempt is removed first.

    Args:
        source: what it is made of.
        force: an existing ``target`` is replaced, once the new one is complete.
        size: bytes that will be needed.

    Raises:
        ValueError: as ``check_target``; or the parent of ``target`` cannot be written, or has too little room, or
            another process is writing ``target``.
        OSError: a file could not be written; what was at ``target`` is untouched.
    """
    check_target(target, source, force)
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{target.parent} cannot be made ({error.strerror}): choose another place.") from None
    with alone(target), _filled(target, size) as unfinished:
        yield unfinished


@contextmanager
def _filled(target: Path, size: int) -> Iterator[Path]:
    unfinished = target.parent / f".{target.name}.unfinished"
    replaced = target.parent / f".{target.name}.replaced"
    try:
        _remove(unfinished)
        unfinished.mkdir()
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
        _remove(replaced)
        target.rename(replaced)
    try:
        unfinished.rename(target)
    except OSError:
        if replaced.is_dir():
            replaced.rename(target)
        raise
    fsync(target.parent)
    _remove(replaced)


def _remove(path: Path) -> None:
    """What an earlier attempt has left, whatever it is."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
