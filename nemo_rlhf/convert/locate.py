"""What a path holds: a Hugging Face directory or a Megatron checkpoint. Reads configuration files only, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from nemo_rlhf.config.architecture import FILE_NAME, Architecture
from nemo_rlhf.convert.families import architecture_of

Format = Literal["hf", "megatron"]
CONFIG = "config.json"
TOKENIZER = "tokenizer"
_MAIN = ("policy", "reward")  # what a training checkpoint stands for


def resolve_restore_from(path: str | Path) -> tuple[Format, Path]:
    """Format of the model at ``path`` and the directory that holds it.

    A training checkpoint stands for its policy or reward model; ``<checkpoint>/critic`` names the critic.

    Raises:
        ValueError: there is no model at ``path``.
    """
    path = Path(path)
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


def read_architecture(path: str | Path) -> Architecture:
    """Architecture of the model at ``path``, in either format. Raises ValueError when there is none that we support."""
    form, directory = resolve_restore_from(path)
    if form == "megatron":
        return Architecture.load(directory)
    try:
        hf_config = json.loads((directory / CONFIG).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{directory / CONFIG} is not JSON ({error}): restore the file.") from None
    return architecture_of(hf_config)


def tokenizer_directory(path: str | Path) -> Path:
    """Where the tokenizer of the model at ``path`` lies. The directory need not exist."""
    form, directory = resolve_restore_from(path)
    return directory / TOKENIZER if form == "megatron" else directory
