"""How a role gets its weights, and how it is stored: from either format, or from a seed; as a Megatron checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from nemo_rlhf.config.schema import DataConfig, ModelConfig, PPOModelConfig
from nemo_rlhf.convert.load import HEADS, check_source, init_heads, load_weights, open_source
from nemo_rlhf.convert.locate import TOKENIZER, read_architecture, resolve_restore_from, tokenizer_directory
from nemo_rlhf.convert.source import RandomSource, WeightSource
from nemo_rlhf.convert.token_ids import check_ids
from nemo_rlhf.convert.transfer import copy_tokenizer
from nemo_rlhf.data.tokenizer import load_tokenizer, save_template, use_template
from nemo_rlhf.models.base import DTYPES, MegatronModel
from nemo_rlhf.models.critic import CriticModel
from nemo_rlhf.parallel import checkpoint

Role = TypeVar("Role", bound=MegatronModel)


def open_tokenizer(config: ModelConfig, data: DataConfig | None = None) -> tuple[Any, Path]:
    """The tokenizer that ``model.tokenizer`` or ``model.restore_from`` names, with the chat template of ``data``, and
    its directory.

    Raises:
        ValueError: there is none, an id of it is not in the model's vocabulary, or the chat template is none.
    """
    directory = Path(config.tokenizer) if config.tokenizer else tokenizer_directory(config.restore_from)
    tokenizer = load_tokenizer(directory)
    check_ids(tokenizer, directory, read_architecture(config.restore_from).vocab_size, config.restore_from)
    if data is not None:
        use_template(tokenizer, data.chat_template, data.chat_template_kwargs)
    return tokenizer, directory


def open_role(kind: type[Role], config: ModelConfig, source: str, precision: str, seed: int, **sizes: Any) -> Role:
    """A role with the weights of ``source``, or, with ``model.init=random``, of its architecture and ``seed``. Heads
    that the source does not have start anew; ``sizes`` are fields of ``Architecture`` that say how large they are.

    Raises:
        ValueError: there is no model, it is damaged, does not fit the cut, or lacks what the role needs.
    """
    stored = read_architecture(source)
    if "value" in stored.heads and kind.role != "critic":
        raise ValueError(f"{source} has a value head and no output layer: name a language model.")
    has_heads = kind.heads != () and stored.heads == kind.heads
    for name, value in sizes.items():
        if has_heads and getattr(stored, name) != value:
            raise ValueError(
                f"the heads in {source} have {name}={getattr(stored, name)}, and {value} is asked for: use the sizes "
                "that it was trained with."
            )
    form, directory = resolve_restore_from(source)
    weights: WeightSource | None = None
    if config.init == "random" and source == config.restore_from:
        weights = RandomSource(stored, seed)
    elif form == "hf":
        weights = open_source(source)
        check_source(weights, stored, critic=kind.role == "critic")
    dtype = str(DTYPES[precision]).removeprefix("torch.")
    model = kind(config, replace(stored, **sizes, heads=kind.heads, dtype=dtype), precision)
    init_heads(model.gpt, seed)
    if weights is not None:
        load_weights(model.gpt, weights, stored)
    else:
        missing = () if has_heads else [name for name, _ in model.gpt.named_parameters() if name.startswith(HEADS)]
        checkpoint.verify_weights(directory)
        checkpoint.load_model(model.gpt, directory, missing=missing)
    if not has_heads:
        model.gpt.start_value_trunk()
    return model


def open_critic(config: PPOModelConfig, vocab_size: int, precision: str, seed: int) -> CriticModel:
    """From ``model.critic.restore_from``, or the policy's source.

    Raises:
        ValueError: as ``open_role``; or its vocabulary is not the policy's ``vocab_size``.
    """
    critic = open_role(CriticModel, config, config.critic.restore_from or config.restore_from, precision, seed)
    if critic.architecture.vocab_size != vocab_size:
        raise ValueError(
            f"the critic in {config.critic.restore_from} has a vocabulary of {critic.architecture.vocab_size} "
            f"and the policy one of {vocab_size}: both must read the same tokens."
        )
    return critic


def save_role(model: MegatronModel, directory: Path, tokenizer: Any, tokenizer_dir: Path) -> None:
    """A whole Megatron checkpoint, into a directory that does not exist yet; all ranks call it."""

    def save_tokenizer() -> None:
        copy_tokenizer(tokenizer_dir, directory / TOKENIZER)
        save_template(tokenizer, directory / TOKENIZER)

    checkpoint.save_model(model.gpt, directory)
    checkpoint.on_rank_zero(save_tokenizer)
