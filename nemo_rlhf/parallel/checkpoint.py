"""Checkpoints: directories that are whole or not there, and that any TP x PP x DP cut can read.

Tensors are megatron-core's ``torch_dist``. A directory is written under a temporary name, gets a manifest of every
file's size and checksum, and is renamed; ``verify`` tells a damaged one from a whole one.
"""

from __future__ import annotations

import errno
import io
import itertools
import queue
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint.api import CheckpointException

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.parallel import manifest, reading, state
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.replicas import load_strategy, save_strategy
from nemo_rlhf.parallel.writers import Mailbox

WEIGHTS = "weights"
PARTIAL = ".partial"
_EXTRA = "_extra_state"  # Transformer Engine's, for FP8: which modules have one depends on what wrote a checkpoint
# What gives the weights their shapes and their meaning.
_SHAPING = [
    "family",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "tie_embeddings",
    "normalization",
    "zero_centered_norm",
    "activation",
    "gated",
    "qkv_bias",
    "linear_bias",
    "qk_norm",
    "position_embedding",
    "sliding_window",
    "windowed_layers",
    "embedding_scale",
    "num_experts",
    "experts_per_token",
    "expert_ffn_hidden_size",
    "normalize_expert_weights",
    "dense_layers",
]


class SaveError(OSError):
    """A checkpoint could not be written; what was there before is untouched. Every rank raises it in the same words."""


# 0.17 would have another package write, and would have to be told not to
_BY_MEGATRON = {"async_strategy": "mcore"} if "async_strategy" in signature(dist_checkpointing.save).parameters else {}
_turns = itertools.count()  # of together, the same on every rank
_take: Callable[[AsyncRequest], None] | None = None  # who writes what save_tensors plans; None: it writes itself
_FAILURES = (OSError, RuntimeError, CheckpointException, CheckpointingException)
filesystem_async.open = manifest.create  # type: ignore[attr-defined]  # for the files that megatron writes


def save_tensors(sharded_state: dict[str, Any], directory: Path) -> None:
    """Write a sharded state dict, all ranks together. The directory must exist and be empty."""
    how = {"sharded_strategy": save_strategy(sharded_state), "validate_access_integrity": False}  # it does that itself
    # megatron would start a process for its queue, which imports a user's script again and outlives a killed rank
    if _take is None:
        filesystem_async._results_queue = queue.Queue()
        dist_checkpointing.save(sharded_state, str(directory), **how)
    else:
        filesystem_async._results_queue = Mailbox()
        _take(dist_checkpointing.save(sharded_state, str(directory), async_sharded_save=True, **how, **_BY_MEGATRON))


@contextmanager
def handed_over(take: Callable[[AsyncRequest], None]) -> Iterator[None]:
    """Inside, ``save_tensors`` writes nothing itself, but hands what is to be written to ``take``."""
    global _take
    _take = take
    try:
        yield
    finally:
        _take = None


def load_tensors(sharded_state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Read what a sharded state dict asks for, all ranks together. Replicas read a part each and send it around.

    Raises:
        ValueError: the checkpoint does not hold it (another architecture, or damaged files).
    """
    directory = Path(directory)
    reading.check(directory)
    try:
        # what the files lack is found where all ranks learn of it, which megatron's stricter ways do not wait for
        return dist_checkpointing.load(
            sharded_state, str(directory), load_strategy(), reading.CommonStrategy(), strict="assume_ok_unexpected"
        )
    except (CheckpointException, CheckpointingException, KeyError, ValueError) as error:
        raise ValueError(
            f"{directory} does not fit this model, or is damaged ({_reason(error)[:300]}): check model.restore_from."
        ) from error


def _model_state(model: GPT) -> dict[str, Any]:
    return model.sharded_state_dict(metadata={"dp_cp_group": state.dp_group()})


def save_model(model: GPT, directory: Path) -> None:
    """Write ``model_config.yaml`` and ``weights/`` of a Megatron checkpoint into an existing directory."""
    weights = Path(directory) / WEIGHTS

    def begin() -> None:
        weights.mkdir(parents=True)
        model.architecture.save(Path(directory))

    on_rank_zero(begin)
    save_tensors(_model_state(model), weights)


def _check_architecture(ours: Architecture, directory: Path) -> None:
    # megatron itself takes a vocabulary of any size, because its padding depends on the cut
    stored = Architecture.load(directory)
    for name in _SHAPING:
        here, there = getattr(ours, name), getattr(stored, name)
        if here != there:
            raise ValueError(
                f"{directory} belongs to another architecture: its {name} is {there} and this model's is {here}; name "
                f"a checkpoint of this model."
            )


def load_model(model: GPT, directory: Path, missing: Collection[str] = ()) -> None:
    """Fill ``model`` with the weights of a Megatron checkpoint, whatever the cut that wrote it.

    Args:
        missing: parameter names that the checkpoint lacks (a new head); they are left as they are.

    Raises:
        ValueError: the checkpoint is of another architecture, or any other parameter is missing.
    """
    weights = Path(directory) / WEIGHTS
    _check_architecture(model.architecture, Path(directory))
    wanted = {n: v for n, v in _model_state(model).items() if n not in missing and _EXTRA not in n}
    loaded = load_tensors(wanted, weights)
    incompatible = model.load_state_dict(loaded, strict=False)
    model.zero_vocabulary_padding()
    absent = [n for n in incompatible.missing_keys if n not in missing and _EXTRA not in n]
    if absent:
        raise ValueError(f"{directory} lacks the weight {absent[0]}: it belongs to another architecture.")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write(directory)`` (all ranks) fill a new directory, which then takes the name ``path``.

    Raises:
        SaveError: on every rank, when any of them failed to write; what stood at ``path`` is still there.
    """
    path = Path(path)
    with told_as_save_error(path), manifest.recorded() as ledger:
        partial = begin(path)
        together(lambda: write(partial), path.parent)
        complete(path, ledger.entries(partial))


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def begin(path: Path) -> Path:
    """A new directory for what will be ``path``."""
    partial = _partial(path)

    def make() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    on_rank_zero(make)
    return partial


def complete(path: Path, described: dict[str, list[int]]) -> None:
    """Give what stands in ``begin``'s directory its manifest and its name. ``described``: what this rank knows of its
    files already, which are on the disk."""
    partial = _partial(path)
    _write_manifest(partial, described)

    def rename() -> None:
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        manifest.fsync(path.parent)

    on_rank_zero(rename)


@contextmanager
def told_as_save_error(path: Path) -> Iterator[None]:
    """Failures inside, which are every rank's, leave nothing behind and are raised as SaveError; a lost connection is
    no failure to write."""
    try:
        yield
    except _FAILURES as error:
        if _is_lost_connection(error):
            raise
        if dist.get_rank() == 0:
            shutil.rmtree(_partial(path), ignore_errors=True)
        reason = _reason(error)
        raise SaveError(
            f"the checkpoint {path} could not be written ({reason}): {_remedy(reason)}; earlier checkpoints are "
            "untouched."
        ) from error


def _is_lost_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)  # gloo's own are but RuntimeErrors


def _remedy(reason: str) -> str:
    """What to do; the reason, which other ranks have but as text, begins with the error's number."""
    if f"[Errno {errno.ENOENT}]" in reason:
        return "something has deleted what was being written; see what else is at work in this directory"
    if f"[Errno {errno.EACCES}]" in reason or f"[Errno {errno.EROFS}]" in reason:
        return "make it writable or name another directory"
    return "free space or name another directory"


def _reason(error: BaseException) -> str:
    """What went wrong, in a few words: of several ranks' failures the first."""
    if isinstance(error, CheckpointException) and error.failures:
        rank = min(error.failures)
        error = error.failures[rank][0]
        return f"rank {rank}: {' '.join(str(error).split())[:300]}"
    return " ".join(str(error).split())[:400] or type(error).__name__


def together(action: Callable[[], None], place: Path) -> None:
    """Run ``action`` on every rank; when it fails on any of them all raise an OSError in the same words, and none waits
    for another. ``place``: whose free space is told.

    They tell each other through the store: a rank that failed in the midst of what ``action`` does with collectives
    must not enter another. Ranks that still wait for it inside ``action`` are freed when its process ends.
    """
    store = dist.distributed_c10d._get_default_store()
    verdict = f"nemo_rlhf/together/{next(_turns)}"
    try:
        action()
    except _FAILURES as error:
        if _is_lost_connection(error) and not _holds(store, verdict):
            raise
        if isinstance(error, CheckpointException) and not error.failures:
            with suppress(RuntimeError):  # another rank knows why, and will say so
                store.wait([verdict], timedelta(seconds=10))
        free = shutil.disk_usage(place).free / 2**20
        mine = f"rank {dist.get_rank()}: {_reason(error)}; {free:.0f} MiB were free"
        with suppress(RuntimeError):  # the store ends with rank 0, which has had its say
            mine = store.compare_set(verdict, "", mine).decode()  # the first one's words
        raise OSError(mine) from error
    if store.add(f"{verdict}/done", 1) == dist.get_world_size():
        store.set(verdict, "")
    if reason := store.get(verdict).decode():
        raise OSError(reason)


def _holds(store: Any, key: str) -> bool:
    with suppress(RuntimeError):  # the store ends with rank 0
        return bool(store.check([key]))
    return False


def on_rank_zero(action: Callable[[], None]) -> None:
    """Run ``action`` on rank 0; all ranks go on together, or all raise an OSError and none waits for another."""
    failure = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, RuntimeError) as error:  # torch.save raises the latter when the disk is full
            failure = [str(error)]  # type: ignore[list-item]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise OSError(failure[0])


def _write_manifest(directory: Path, described: dict[str, list[int]]) -> None:
    parts: list[dict[str, list[int]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, described)
    files = {name: entry for part in parts for name, entry in part.items()}

    def write() -> None:
        for name, (size, _) in files.items():
            if (found := (directory / name).stat().st_size) != size:
                raise OSError(f"{name} has {found} bytes, and {size} were written")
        for name in manifest.files(directory):  # what is left is small, and this rank wrote it
            if name not in files:
                manifest.fsync(directory / name)
                files[name] = manifest.describe(directory / name)
        manifest.write(directory, files)

    on_rank_zero(write)


def verify(directory: Path) -> None:
    """Check a checkpoint against its manifest; all ranks take part.

    Raises:
        ValueError: names the first file that is missing or differs.
    """
    directory = Path(directory)
    try:
        expected = manifest.read(directory)
    except ValueError as error:
        raise ValueError(f"the checkpoint {directory} is damaged: {error}") from None
    _compare(directory, expected)


def verify_weights(directory: Path) -> None:
    """Check a model's weights against the manifest, where there is one; all ranks take part. What people may have
    edited, its description and its tokenizer, is left alone.

    Raises:
        ValueError: names the first file that is missing or differs.
    """
    _compare(directory, manifest.entries_of(directory, WEIGHTS))


def _compare(directory: Path, expected: dict[str, list[int]]) -> None:
    """Every rank reads some of the files, and all raise the same."""
    names = sorted(expected)
    mine = names[dist.get_rank() :: dist.get_world_size()]
    parts: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, [name for name in mine if not manifest.matches(directory / name, expected[name])])
    if wrong := sorted(name for part in parts for name in part):
        raise manifest.damaged(directory, wrong[0])


def remove(directory: Path) -> None:
    """Delete a checkpoint: renamed first, so that what is left of an interrupted deletion is not taken for whole."""
    if dist.get_rank() == 0 and directory.is_dir():
        doomed = directory.with_name(directory.name + PARTIAL)
        shutil.rmtree(doomed, ignore_errors=True)
        directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def save_object(value: Any, file: Path) -> None:
    """Rank 0 writes plain Python numbers, strings, containers and tensors."""

    def write() -> None:
        buffer = io.BytesIO()  # a full disk is then an OSError that says so, which torch.save's own is not
        torch.save(value, buffer)
        file.write_bytes(buffer.getbuffer())

    on_rank_zero(write)
