"""What a path holds: a Hugging Face directory or a Megatron checkpoint.

Reads configuration files only; weights where they decide what the model is: whether its output layer is the embedding.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from nemo_rlhf.config.architecture import FILE_NAME, Architecture
from nemo_rlhf.convert.families import architecture_of, weight_map
from nemo_rlhf.convert.files import blocks
from nemo_rlhf.convert.mapping import EMBEDDING, whole
from nemo_rlhf.convert.source import open_hf, present_files
from nemo_rlhf.untrusted import read_json

Format = Literal["hf", "megatron"]
CONFIG = "config.json"
_OUTPUT = "lm_head.weight"  # in every family
TOKENIZER = "tokenizer"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MAIN = ("policy", "reward")  # what a training checkpoint stands for


def resolve_restore_from(path: str | Path) -> tuple[Format, Path]:
    """Format of the model at ``path`` and the directory that holds it.

    A training checkpoint stands for its policy or reward model; ``<checkpoint>/critic`` names the critic.

    Raises:
        ValueError: there is no model at ``path``.
    """
    path = Path(path)
    _refuse_adapters(path)
    if (path / FILE_NAME).is_file():
        return "megatron", path
    for name in _MAIN:
        if (path / name / FILE_NAME).is_file():
            return "megatron", path / name
    if (path / CONFIG).is_file():
        return "hf", path
    if not path.is_dir():
        raise ValueError(
            f"There is no directory {path}: name a local Hugging Face directory (fetch one with `hf download`) or a "
            "Megatron checkpoint."
        )
    raise ValueError(
        f"{path} is neither a Hugging Face directory (no {CONFIG}) nor a Megatron checkpoint (no {FILE_NAME})."
    )


def _refuse_adapters(path: Path) -> None:
    """transformers would load an adapter that lies beside a model; here nothing does."""
    is_model = (path / CONFIG).is_file() or (path / FILE_NAME).is_file()
    for name in _ADAPTER:
        places = [path / name, *([] if is_model else sorted(path.glob(f"*/{name}")))]
        if (found := next((place for place in places if place.is_file()), None)) is None:
            continue
        base = None
        if found.name == _ADAPTER[0]:
            base = read_json(found).get("base_model_name_or_path")
        raise ValueError(
            f"{found.parent} holds a PEFT adapter ({found.name}) of {base or 'a model'}, whose weights are not read "
            "here: merge both with PeftModel.from_pretrained(...).merge_and_unload().save_pretrained(NEW_DIR), or move "
            "the adapter's files away to go without it."
        )


def read_architecture(path: str | Path) -> Architecture:
    """Architecture of the model at ``path``, in either format. Raises ValueError when there is none that we support.

    As in transformers, a Hugging Face model whose embedding and output layer are both stored, and differ, is not tied,
    whatever its ``config.json`` says.
    """
    form, directory = resolve_restore_from(path)
    if form == "megatron":
        return Architecture.load(directory)
    try:
        architecture = architecture_of(read_json(directory / CONFIG))
    except ValueError as error:
        message = str(error)
        if not message.startswith("config.json"):
            raise
        raise ValueError(f"{directory / CONFIG}{message.removeprefix('config.json')}") from None
    if architecture.tie_embeddings and not architecture.heads and _has_own_head(directory, architecture):
        told = {**architecture.hf_config, "tie_word_embeddings": False}
        architecture = replace(architecture, tie_embeddings=False, hf_config=told)
    return architecture


def _has_own_head(directory: Path, architecture: Architecture) -> bool:
    files = present_files(directory)  # where some are missing, whoever loads the weights says so
    state = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    embedding = weight_map(architecture).entries[EMBEDDING].names[0]
    return bool(state) and _differs(directory, embedding, _OUTPUT, state)


@lru_cache(maxsize=8)
def _differs(directory: Path, embedding: str, output: str, _: tuple[tuple[str, int, int], ...]) -> bool:
    """Whether both tensors are there, with other values; compared once for files that stay as they are."""
    source = open_hf(directory)
    if not {embedding, output} <= {*source.names()}:
        return False
    if (shape := source.shape(embedding)) != source.shape(output):
        return True
    rows = blocks(0, shape[0], shape[1] * source.dtype(embedding).itemsize)
    boxes = [(slice(start, stop), *whole(shape[1:])) for start, stop in rows]
    dtype = torch.promote_types(source.dtype(embedding), source.dtype(output))
    return any(not torch.equal(*(source.read(name, box).to(dtype) for name in (embedding, output))) for box in boxes)


def tokenizer_directory(path: str | Path) -> Path:
    """Where the tokenizer of the model at ``path`` lies. The directory need not exist."""
    form, directory = resolve_restore_from(path)
    return directory / TOKENIZER if form == "megatron" else directory
