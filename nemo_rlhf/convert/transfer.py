"""Whole checkpoints from one format to the other. Each appears under its name only when it is complete."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.checkpoint import CheckpointSource
from nemo_rlhf.convert.locate import CONFIG, TOKENIZER, read_architecture, resolve_restore_from, tokenizer_directory
from nemo_rlhf.convert.mapping import whole
from nemo_rlhf.convert.source import WeightSource, open_hf

GENERATION_CONFIG = "generation_config.json"
# what transformers writes for a tokenizer, whichever its kind
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def import_hf(hf_dir: str | Path, ckpt_dir: str | Path, *, force: bool = False) -> Path:
    """Write the model of a Hugging Face directory as a Megatron checkpoint, in the dtype that its weights have.

    Runs in one process, which need not be prepared: torch.distributed is set up for a world of one when it is not.
    Needs memory for the whole model.

    Args:
        force: replace an existing ``ckpt_dir``.

    Raises:
        ValueError: no such model, not supported, damaged, or ``ckpt_dir`` exists.
        OSError: the checkpoint cannot be written; nothing of it is left.
    """
    from nemo_rlhf.convert.load import load_weights
    from nemo_rlhf.parallel import checkpoint, state
    from nemo_rlhf.parallel.gpt import build_gpt

    form, hf_dir = resolve_restore_from(hf_dir)
    if form != "hf":
        raise ValueError(f"{hf_dir} is a Megatron checkpoint already.")
    source = open_hf(hf_dir)
    dtype = stored_dtype(source)
    architecture = replace(read_architecture(hf_dir), dtype=_name(dtype))
    refuse_existing(Path(ckpt_dir), force)
    if not torch.distributed.is_initialized():
        state.set_environment_for_one_process()
    state.initialize(tensor_parallel=1, pipeline_parallel=1, seed=0)
    model = build_gpt(architecture, dtype=dtype)
    load_weights(model, source, architecture)

    def write(directory: Path) -> None:
        checkpoint.save_model(model, directory)
        copy_tokenizer(hf_dir, directory / TOKENIZER)

    checkpoint.write_atomically(Path(ckpt_dir), write)
    return Path(ckpt_dir)


def export_hf(
    ckpt_dir: str | Path, hf_dir: str | Path, max_shard_size: str | int = "5GB", *, force: bool = False
) -> Path:
    """Write the language model of a Megatron checkpoint as a Hugging Face directory, in the dtype it is stored in.

    Runs in one process on the CPU, without building a model; holds one shard of weights at a time.

    Args:
        max_shard_size: bytes, or a number with KB, MB, GB, KiB, MiB or GiB.
        force: replace an existing ``hf_dir``.

    Raises:
        ValueError: no such checkpoint, damaged, not a language model, or ``hf_dir`` exists.
    """
    form, ckpt_dir = resolve_restore_from(ckpt_dir)
    if form != "megatron":
        raise ValueError(f"{ckpt_dir} is a Hugging Face directory already.")
    architecture = Architecture.load(ckpt_dir)
    if architecture.heads:
        raise ValueError(
            f"{ckpt_dir} holds a model with a {' and '.join(architecture.heads)} head; only language models can be "
            "exported: name the policy instead."
        )
    limit = parse_size(max_shard_size)
    source = CheckpointSource(ckpt_dir, architecture)
    with new_directory(Path(hf_dir), force) as directory:
        write_safetensors(source, directory, limit)
        config = hf_config(architecture, stored_dtype(source))
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        copy_tokenizer(tokenizer_directory(ckpt_dir), directory)
    return Path(hf_dir)


def stored_dtype(source: WeightSource) -> torch.dtype:
    """The dtype of all weights; the narrowest that holds each exactly where they differ."""
    return functools.reduce(torch.promote_types, {source.dtype(name) for name in source.names()})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hf_config(architecture: Architecture, dtype: torch.dtype) -> dict[str, Any]:
    """The ``config.json`` that the model came from, naming the dtype that its weights have now."""
    if not architecture.hf_config:
        raise ValueError("The checkpoint's model_config.yaml has no hf_config to write a config.json from.")
    key = "torch_dtype" if "torch_dtype" in architecture.hf_config else "dtype"
    return {**architecture.hf_config, key: _name(dtype)}


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "200 MiB" or a plain number. Raises ValueError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(size).strip(), re.IGNORECASE)
    result = int(float(match[1]) * _UNITS.get((match[2] or "").upper(), 1)) if match else 0
    if result <= 0:
        raise ValueError(f"max_shard_size={size!r} is not a size: give bytes or, for example, 5GB or 500MiB.")
    return result


def write_safetensors(source: WeightSource, directory: Path, max_shard_bytes: int) -> None:
    """All tensors of ``source`` as ``model.safetensors``, or as shards with an index where that would be too large."""
    shards = _plan(source, max_shard_bytes)
    files: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: source.read(name, whole(source.shape(name))).contiguous() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        files |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _plan(source: WeightSource, max_shard_bytes: int) -> list[list[str]]:
    """Names by shard, in order. A tensor above the limit gets a shard of its own."""
    shards: list[list[str]] = []
    room = 0
    for name in source.names():
        size = torch.Size(source.shape(name)).numel() * source.dtype(name).itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def copy_tokenizer(origin: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings unchanged; what ``origin`` lacks is left out."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*_TOKENIZER_FILES, GENERATION_CONFIG):
        if (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)


def refuse_existing(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise ValueError(f"{target} exists already: name a new directory or remove it.")


@contextmanager
def new_directory(target: Path, force: bool) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when the block ends well and vanishes when it does not.

    Raises:
        ValueError: ``target`` exists and ``force`` is not set, or its parent cannot be written.
    """
    refuse_existing(target, force)
    temporary = target.parent / f".{target.name}.unfinished"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{target.parent} cannot be written to ({error.strerror}): choose another place.") from None
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _sync(path)
        _sync(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
