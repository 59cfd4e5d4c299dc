"""Loading a tokenizer from a directory, tokenising texts, and telling two tokenizers apart."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_rlhf.data.chat_format import takes_bos
from nemo_rlhf.data.chats import check_variables
from nemo_rlhf.untrusted import read_json

# What a directory holds when there is a tokenizer in it; one of these is enough.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(directory: str | Path) -> Any:
    """The transformers tokenizer in ``directory``: a Hugging Face directory, or a Megatron checkpoint, which has it in
    ``tokenizer/``. Nothing is fetched from a network, and no code that comes with it is run.

    Its ``eos_token_id`` is never None, nor is its ``pad_token_id``: EOS stands in where there is no padding token
    (padding is never attended to nor learned, so which token it is does not matter). ``generation_eos_ids`` are the ids
    that ``generation_config.json`` beside it names, any of which ends a response.

    Raises:
        ValueError: there is no tokenizer, it cannot be read, it has no EOS token, or ``generation_config.json`` names
            ids that it has not.
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
    described = any((found / name).is_file() for name in ("tokenizer_config.json", "config.json"))
    kind = AutoTokenizer if described else PreTrainedTokenizerFast
    try:
        tokenizer = kind.from_pretrained(str(found), local_files_only=True, trust_remote_code=False)
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
    tokenizer.generation_eos_ids = _generation_eos_ids(found, len(tokenizer))
    return tokenizer


def use_template(tokenizer: Any, template: str | Path | None, variables: Mapping[str, Any]) -> None:
    """Give a tokenizer the chat template in a file, if one is named, and what every chat sets of its variables.

    Raises:
        ValueError: the file cannot be read, is no template, or has no such variable.
    """
    if template is not None:
        tokenizer.chat_template = tokenizer.template_of_data = _read_template(Path(template))
    if variables and not tokenizer.chat_template:
        raise ValueError("data.chat_template_kwargs are given, and the tokenizer has no chat template that reads them.")
    check_variables("data.chat_template_kwargs", variables, tokenizer.get_chat_template() if variables else "")
    tokenizer.chat_template_kwargs = dict(variables)


def save_template(tokenizer: Any, directory: Path) -> None:
    """Put the chat template that ``use_template`` gave a tokenizer, if it did, beside that tokenizer's files in
    ``directory``, where it takes the place of its own."""
    if (template := getattr(tokenizer, "template_of_data", None)) is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _read_template(path: Path) -> str:
    import jinja2

    try:
        text = path.read_text(encoding="utf-8-sig")
        # {% generation %} and the loop controls are what transformers adds to the language
        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template={path} cannot be read ({error}).") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"data.chat_template={path}, line {error.lineno}, is no Jinja template: {error}") from error
    if not text.strip():
        raise ValueError(f"data.chat_template={path} is empty.")
    return text


def _generation_eos_ids(directory: Path, num_tokens: int) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    if not path.is_file():
        return ()
    named = read_json(path).get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < num_tokens:
            raise ValueError(
                f"{path} says eos_token_id {json.dumps(one)}, and the tokenizer beside it has tokens 0 to "
                f"{num_tokens - 1}: mend it."
            )
    return tuple(ids)


def fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 of the vocabulary with its ids and of the ids of BOS, EOS and UNK.

    It is equal where the same id means the same token. The padding token does not count, as no model learns it."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([vocabulary, special], ensure_ascii=True).encode()).hexdigest()


def encode(tokenizer: Any, text: str, *, start: bool, split_special: bool = False) -> list[int]:
    """Token ids of ``text``.

    Args:
        start: it begins a sequence, so the special tokens that the tokenizer puts in front of a text (BOS) stand there,
            once where the text has them itself, and not where it is a chat of a template that has none; those that it
            puts behind one (EOS) never do.
        split_special: the name of a special token in the text is words, and not that token.
    """
    options = {"verbose": False, **({"split_special_tokens": True} if split_special else {})}
    own = list(tokenizer(text, add_special_tokens=False, **options)["input_ids"])
    if not start or not takes_bos(tokenizer, text):
        return own
    prefix = _added_in_front(tokenizer)
    while prefix and own[: len(prefix)] == prefix:
        own = own[len(prefix) :]
    return [*prefix, *own]


def _added_in_front(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text."""
    own = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
    at = next((index for index in range(len(whole)) if own and whole[index : index + len(own)] == own), 0)
    return whole[:at]


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)
