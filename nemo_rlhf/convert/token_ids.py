"""Ids of special tokens: a model's files and its tokenizer say them, and must mean the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rlhf.untrusted import read_json

_KEYS = ("eos_token_id", "bos_token_id", "pad_token_id")
_FILES = ("config.json", "generation_config.json")


def open_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a directory. Nothing that the directory brings along is run, and nothing fetched.

    Raises ValueError when there is none that can be read so.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise anything
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the tokenizer in {directory} cannot be read ({type(error).__name__}: {reason}).") from None


def check_ids(tokenizer: Any, directory: Path, vocab_size: int, model: str | Path) -> None:
    """See that a model can read all that its tokenizer, in ``directory``, can say.

    Raises:
        ValueError: an id of the tokenizer, or a special one in a file beside it, is not in the model's vocabulary.
    """
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} has {len(tokenizer)} tokens, but the model in {model} has a vocabulary of "
            f"{vocab_size}: name its own tokenizer in model.tokenizer."
        )
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {directory} gives {token!r} the id {highest}, but the model in {model} has a vocabulary "
            f"of {vocab_size}: name its own tokenizer in model.tokenizer."
        )
    for name in _FILES:
        path = directory / name
        for key, ids in _said(read_json(path) if path.is_file() else {}).items():
            if wrong := [i for i in ids if type(i) is not int or i >= vocab_size]:
                raise ValueError(
                    f"{path} sets {key} to {wrong[0]!r}, but the model in {model} has a vocabulary of {vocab_size}: "
                    "correct the file."
                )


def _said(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    values = {key: config[key] for key in _KEYS if config.get(key) is not None}
    return {key: value if isinstance(value, list) else [value] for key, value in values.items()}


def with_ids_of(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (of a model, or of generation) with the tokenizer's EOS, BOS and padding.

    A list of EOS ids stays where the tokenizer's is among them. Where the tokenizer has no such token, an id stays that
    is a special token of its, and any other goes.
    """
    result = dict(config)
    said = _said(config)
    for key in _KEYS:
        found = getattr(tokenizer, key)
        if found is not None and found not in said.get(key, ()):
            result[key] = found
        elif found is None and any(i not in tokenizer.all_special_ids for i in said.get(key, ())):
            result[key] = None
    return result
