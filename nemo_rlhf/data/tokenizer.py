"""Loading a tokenizer from a directory, and telling two tokenizers apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What a directory holds when there is a tokenizer in it; one of these is enough.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: str | Path) -> Any:
    """The transformers tokenizer in ``directory``: a Hugging Face directory, or a Megatron checkpoint, which has it in
    ``tokenizer/``. Nothing is fetched from a network.

    Its ``eos_token_id`` is never None, nor is its ``pad_token_id``: EOS stands in where there is no padding token
    (padding is never attended to nor learned, so which token it is does not matter).
    Raises ValueError where there is no tokenizer, where it cannot be read, and where it has no EOS token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"There is no directory {directory} to load a tokenizer from.")
    found = next((path for path in (root / "tokenizer", root) if _has_tokenizer(path)), None)
    if found is None:
        raise ValueError(
            f"{directory} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}, in it or in its tokenizer/): "
            "save one there with tokenizer.save_pretrained(...), or name its directory in model.tokenizer."
        )
    try:
        if any((found / name).is_file() for name in ("tokenizer_config.json", "config.json")):
            tokenizer = AutoTokenizer.from_pretrained(str(found), local_files_only=True, trust_remote_code=False)
        else:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                str(found), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # transformers raises whatever its parsers do
        reason = " ".join(str(error).split())
        raise ValueError(f"The tokenizer in {found} cannot be loaded ({type(error).__name__}: {reason}).") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f'The tokenizer in {found} has no EOS token, without which no response ends: set "eos_token" in its '
            "tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 of the vocabulary with its ids and of the ids of BOS, EOS and UNK.

    It is equal where the same id means the same token. The padding token does not count, as no model learns it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([vocabulary, special], ensure_ascii=True).encode()).hexdigest()


def encode(tokenizer: Any, text: str, *, start: bool) -> list[int]:
    """Token ids of ``text``. At the ``start`` of a sequence, with the special tokens that the tokenizer puts in front
    of a text (BOS) but without those that it puts behind one (EOS); otherwise with neither."""
    ids = list(tokenizer(text, add_special_tokens=start, verbose=False)["input_ids"])
    eos = tokenizer.eos_token_id
    if start and ids and ids[-1] == eos:
        # The text may end in EOS itself, so only what is not the text's own goes.
        own = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if ids[-len(own) :] != own if own else eos != tokenizer.bos_token_id:
            ids.pop()
    return ids


def render_chat(tokenizer: Any, messages: Sequence[Any], where: str, *, generation_prompt: bool) -> str:
    """``messages`` ({"role", "content"} each) as the text that the tokenizer's chat template makes of them.

    ``generation_prompt``: with the header of the assistant's next turn. Raises ValueError, which begins with
    ``where``, when there is no template or it does not take these messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a list of chat messages, and the tokenizer has no chat template: give text, or use a "
            'tokenizer with "chat_template".'
        )
    if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise ValueError(f'{where} is not a list of chat messages: each must be an object with "role" and "content".')
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: the tokenizer's chat template does not take these messages ({reason}).") from error


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)
