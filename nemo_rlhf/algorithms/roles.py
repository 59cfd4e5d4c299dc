"""How a role gets its weights, and how it is stored: from either format, or from a seed; as a Megatron checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.convert.load import init_value_head, load_weights, open_source
from nemo_rlhf.convert.locate import TOKENIZER, read_architecture, resolve_restore_from, tokenizer_directory
from nemo_rlhf.convert.source import RandomSource
from nemo_rlhf.convert.transfer import copy_tokenizer
from nemo_rlhf.data.tokenizer import load_tokenizer
from nemo_rlhf.models.base import DTYPES, MegatronModel
from nemo_rlhf.parallel import checkpoint

Role = TypeVar("Role", bound=MegatronModel)
_VALUE_HEAD = ("value_head.weight",)


def open_tokenizer(config: ModelConfig) -> tuple[Any, Path]:
    """The tokenizer that ``model.tokenizer`` or ``model.restore_from`` names, and its directory.

    Raises:
        ValueError: there is none, or it has more tokens than the model's vocabulary.
    """
    directory = Path(config.tokenizer) if config.tokenizer else tokenizer_directory(config.restore_from)
    tokenizer = load_tokenizer(directory)
    vocab_size = read_architecture(config.restore_from).vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, but the model in {config.restore_from} has a "
            f"vocabulary of {vocab_size}: name its own tokenizer in model.tokenizer."
        )
    return tokenizer, directory


def open_role(kind: type[Role], config: ModelConfig, source: str, precision: str, seed: int) -> Role:
    """A role with the weights of ``source``, or, with ``model.init=random``, of its architecture and ``seed``."""
    architecture = read_architecture(source)
    model = kind(config, architecture, precision)
    random = config.init == "random" and source == config.restore_from
    form, directory = resolve_restore_from(source)
    if kind.role == "critic":
        init_value_head(model.gpt)
    if random:
        load_weights(model.gpt, RandomSource(architecture, seed), architecture)
    elif form == "hf":
        load_weights(model.gpt, open_source(source), architecture)
    else:
        missing = _VALUE_HEAD if kind.role == "critic" and "value" not in architecture.heads else ()
        checkpoint.load_model(model.gpt, directory, missing=missing)
    stored = replace(
        architecture,
        dtype=str(DTYPES[precision]).removeprefix("torch."),
        heads=("value",) if kind.role == "critic" else (),
    )
    model.architecture = model.gpt.architecture = stored
    return model


def save_role(model: MegatronModel, directory: Path, tokenizer_dir: Path) -> None:
    """A whole Megatron checkpoint, into a directory that does not exist yet; all ranks call it."""
    checkpoint.save_model(model.gpt, directory)
    checkpoint.on_rank_zero(lambda: copy_tokenizer(tokenizer_dir, directory / TOKENIZER))
