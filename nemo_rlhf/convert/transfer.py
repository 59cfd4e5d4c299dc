"""Whole checkpoints from one format to the other. Each appears under its name only when it is complete.

Weights pass through in blocks of a few megabytes, so the memory needed does not grow with the model; nothing needs a
GPU, a model or torch.distributed.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.checkpoint import VALUE_TRUNK, WEIGHTS, CheckpointSource
from nemo_rlhf.convert.directory import GENERATION_CONFIG, TOKENIZER_FILES, check_target, new_directory
from nemo_rlhf.convert.families import class_name, weight_map
from nemo_rlhf.convert.ilql_heads import STEM
from nemo_rlhf.convert.locate import CONFIG, TOKENIZER, read_architecture, resolve_restore_from, tokenizer_directory
from nemo_rlhf.convert.source import WeightSource, open_hf
from nemo_rlhf.convert.to_hf import write_safetensors
from nemo_rlhf.convert.to_megatron import write_weights
from nemo_rlhf.convert.token_ids import open_tokenizer, with_ids_of
from nemo_rlhf.convert.workers import check_workers
from nemo_rlhf.parallel import manifest
from nemo_rlhf.untrusted import read_json

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def import_hf(hf_dir: str | Path, ckpt_dir: str | Path, *, force: bool = False, workers: int = 1) -> Path:
    """Write the model of a Hugging Face directory as a Megatron checkpoint, in the dtype that its weights have.

    Args:
        force: replace an existing ``ckpt_dir``, once the new one is complete.
        workers: processes that share the work.

    Raises:
        ValueError: no such model, not supported, damaged, ``ckpt_dir`` exists or there is no room for it.
        OSError: the checkpoint cannot be written; nothing of it is left.
    """
    form, hf_dir = resolve_restore_from(hf_dir)
    if form != "hf":
        raise ValueError(f"{hf_dir} is a Megatron checkpoint already.")
    check_workers(workers)
    check_target(Path(ckpt_dir), hf_dir, force)
    source, architecture = open_hf(hf_dir), read_architecture(hf_dir)
    weights = weight_map(architecture)
    weights.check({name: source.shape(name) for name in source.names()}, source.where)
    architecture = replace(architecture, dtype=dtype_name(stored_dtype(source)))
    with new_directory(Path(ckpt_dir), hf_dir, force, _bytes(source)) as directory:
        (directory / WEIGHTS).mkdir()
        described, written = write_weights(source, architecture, directory / WEIGHTS, workers)
        _compare_counts(_count(source, set(weights.tensors)), written, hf_dir)
        copy_tokenizer(hf_dir, directory / TOKENIZER)
        architecture.save(directory)  # last, for it makes the directory look like a checkpoint
        known = {f"{WEIGHTS}/{name}": entry for name, entry in described.items()}
        names = manifest.files(directory)
        manifest.write(directory, {name: known.get(name) or manifest.describe(directory / name) for name in names})
    return Path(ckpt_dir)


def export_hf(
    ckpt_dir: str | Path,
    hf_dir: str | Path,
    max_shard_size: str | int = "5GB",
    *,
    force: bool = False,
    workers: int = 1,
) -> Path:
    """Write the model of a Megatron checkpoint as a Hugging Face directory, in the dtype it is stored in. A critic or
    reward model becomes a sequence classification model with one label; the heads of an ILQL model go to a file of
    their own beside a plain language model, ``ilql_heads.safetensors``, and their trunk, if it is their own, to a
    directory ``value_trunk`` there.

    Args:
        max_shard_size: bytes, or a number with KB, MB, GB, KiB, MiB or GiB.
        force: replace an existing ``hf_dir``, once the new one is complete.
        workers: processes that share the work.

    Raises:
        ValueError: no such checkpoint, damaged, ``hf_dir`` exists or there is no room for it.
        OSError: the directory cannot be written; nothing of it is left.
    """
    form, ckpt_dir = resolve_restore_from(ckpt_dir)
    if form != "megatron":
        raise ValueError(f"{ckpt_dir} is a Hugging Face directory already.")
    architecture = Architecture.load(ckpt_dir)
    limit = parse_size(max_shard_size)
    check_workers(workers)
    check_target(Path(hf_dir), ckpt_dir, force)
    source = CheckpointSource(ckpt_dir, architecture)
    manifest.check(ckpt_dir, WEIGHTS, workers)
    tokenizer = _tokenizer(tokenizer_directory(ckpt_dir))
    config = hf_config(architecture, stored_dtype(source), tokenizer)
    heads, trunk = source.heads(), source.value_trunk
    size = sum(_bytes(part) for part in (source, heads, trunk) if part is not None)
    with new_directory(Path(hf_dir), ckpt_dir, force, size) as directory:
        written = write_safetensors(source, directory, limit, workers)
        _compare_counts(weight_map(architecture).num_parameters(), written, ckpt_dir)
        if trunk is not None:
            beside = directory / VALUE_TRUNK.rstrip(".")
            beside.mkdir()
            written = write_safetensors(trunk, beside, limit, workers)
            _compare_counts(_count(trunk, trunk.names()), written, ckpt_dir)
            described = hf_config(trunk.architecture, stored_dtype(trunk), tokenizer)
            _write_config(described, beside / CONFIG)
        if heads.names():
            written = write_safetensors(heads, directory, math.inf, workers, stem=STEM)
            _compare_counts(_count(heads, heads.names()), written, ckpt_dir)
        copy_tokenizer(tokenizer_directory(ckpt_dir), directory)
        _write_config(config, directory / CONFIG)
        generation = directory / GENERATION_CONFIG
        if tokenizer is not None and generation.is_file():
            _write_config(with_ids_of(tokenizer, read_json(generation)), generation)
    return Path(hf_dir)


def _write_config(config: dict[str, Any], path: Path) -> None:
    """Leave the file as it is where it says ``config`` already, so that its bytes stay those of the origin."""
    if not path.is_file() or read_json(path) != config:
        path.write_text(json.dumps(config, indent=2) + "\n")


def _compare_counts(expected: int, written: int, origin: Path) -> None:
    if expected != written:
        raise ValueError(f"{origin} has {expected} parameters, but {written} were converted: the files are damaged.")


def _count(source: WeightSource, names: Collection[str]) -> int:
    return sum(math.prod(source.shape(name)) for name in names)


def _bytes(source: WeightSource) -> int:
    return sum(math.prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names())


def stored_dtype(source: WeightSource) -> torch.dtype:
    """The dtype that most parameters are stored in."""
    counts: Counter[torch.dtype] = Counter()
    for name in source.names():
        counts[source.dtype(name)] += math.prod(source.shape(name))
    return counts.most_common(1)[0][0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hf_config(architecture: Architecture, dtype: torch.dtype, tokenizer: Any) -> dict[str, Any]:
    """The ``config.json`` that the model came from, naming the dtype that its weights have now, the class that its head
    makes of it, and the special tokens of ``tokenizer``, which may be None."""
    if not architecture.hf_config:
        raise ValueError("The checkpoint's model_config.yaml has no hf_config to write a config.json from.")
    config = dict(architecture.hf_config)
    for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
        config[key] = dtype_name(dtype)
    name = class_name(architecture)
    if "trunk" in architecture.heads:
        config |= {"architectures": [name]}
    if "value" in architecture.heads and config["architectures"] != [name]:
        config |= {"architectures": [name], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if tokenizer is not None:
        config = with_ids_of(tokenizer, config)
        if "value" in architecture.heads and config.get("pad_token_id") is None:
            config["pad_token_id"] = tokenizer.eos_token_id  # by which the last token of a row is found
    return config


def _tokenizer(directory: Path) -> Any:
    """That of a model that is exported; None where there is none that can be read, which is said."""
    if not (directory / "tokenizer_config.json").is_file():
        return None
    try:
        return open_tokenizer(directory)
    except ValueError as error:
        warnings.warn(f"{error} The ids of EOS, BOS and padding stay as they were.", stacklevel=3)
        return None


def parse_size(size: str | int) -> int:
    """Bytes of "5GB", "200 MiB" or a plain number. Raises ValueError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", str(size).strip(), re.IGNORECASE)
    result = int(float(match[1]) * _UNITS.get((match[2] or "").upper(), 1)) if match else 0
    if result <= 0:
        raise ValueError(f"max_shard_size={size!r} is not a size: give bytes or, for example, 5GB or 500MiB.")
    return result


def copy_tokenizer(origin: Path, target: Path) -> None:
    """Copy tokenizer, chat template, ``config.json`` and generation settings unchanged; what ``origin`` lacks is left
    out.

    Raises:
        ValueError: one of the files is a link that leads to something else; what is copied may be shown to others.
    """
    target.mkdir(parents=True, exist_ok=True)
    for pattern in (*TOKENIZER_FILES, GENERATION_CONFIG, CONFIG):
        for file in origin.glob(pattern):
            if file.is_file():
                _refuse_leading_elsewhere(file, origin)
                copy = target / file.relative_to(origin)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _refuse_leading_elsewhere(file: Path, origin: Path) -> None:
    """A link may lead to a file of its own name, as people lay models together, or into Hugging Face's cache."""
    inside, real = origin.resolve(), file.resolve()
    if real.is_relative_to(inside):
        return
    is_plain = file.parent.resolve().is_relative_to(inside)
    if not is_plain or not (real.name == file.name or real.parent == inside.parent.parent / "blobs"):
        raise ValueError(f"{file} leads to {real}, which is not of this model: put the file itself there.")
