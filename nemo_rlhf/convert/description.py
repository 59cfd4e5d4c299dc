"""What lies in a checkpoint of either format, said without reading its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.checkpoint import CheckpointSource
from nemo_rlhf.convert.families import weight_map
from nemo_rlhf.convert.locate import read_architecture, resolve_restore_from, tokenizer_directory
from nemo_rlhf.convert.source import open_hf
from nemo_rlhf.convert.token_ids import open_tokenizer
from nemo_rlhf.untrusted import read_json

_IDENTITY = "identity.json"  # what training writes beside the models of a step
_NOT_SHAPING = (
    "hf_config",
    "initializer_range",
    "dtype",
    "heads",
    "ilql_num_q",
    "ilql_head_width",
    "score_mean",
    "score_std",
)


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe the model at ``path``, a Hugging Face directory or a Megatron checkpoint (of a training checkpoint, its
    policy), in plain values. Its weight files are opened and every tensor's name and shape is checked.

    ``fingerprint`` is the same for two checkpoints whose weights fit each other and mean the same tokens: the SHA-256
    of architecture and vocabulary, 16 digits of it.

    Raises:
        ValueError: there is no model at ``path``, or it is damaged or not supported.
    """
    form, directory = resolve_restore_from(path)
    architecture = read_architecture(path)
    weights = weight_map(architecture)
    source = open_hf(directory) if form == "hf" else CheckpointSource(directory, architecture)
    weights.check({name: source.shape(name) for name in source.names()}, source.where)
    tokenizer, vocabulary = _tokenizer(tokenizer_directory(path))
    return {
        "path": str(directory),
        "format": {"hf": "Hugging Face", "megatron": "Megatron"}[form],
        "family": architecture.family,
        "parameters": weights.num_parameters(),
        "dtype": " and ".join(sorted({str(source.dtype(n)).removeprefix("torch.") for n in source.names()})),
        "heads": [*([] if "value" in architecture.heads else ["language model"]), *architecture.heads],
        **_sizes(architecture),
        "tokenizer": tokenizer,
        "step": _step(directory),
        "bytes": sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()),
        "fingerprint": _fingerprint(architecture, vocabulary),
    }


def _sizes(architecture: Architecture) -> dict[str, Any]:
    names = [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "max_position_embeddings",
        "tie_embeddings",
    ]
    if architecture.sliding_window:
        names.append("sliding_window")
    if architecture.num_experts:
        names += ["num_experts", "experts_per_token", "expert_ffn_hidden_size"]
    if "ilql" in architecture.heads:
        names += ["ilql_num_q", "ilql_head_width"]
    return {name: getattr(architecture, name) for name in names}


def _tokenizer(directory: Path) -> tuple[dict[str, Any] | None, list[Any]]:
    """What is said of the tokenizer, None where there is none; and its vocabulary."""
    if not (directory / "tokenizer_config.json").is_file():
        return None, []
    tokenizer = open_tokenizer(directory)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    said = {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "eos_token": tokenizer.eos_token,
        "chat_template": bool(tokenizer.chat_template),
    }
    return said, vocabulary


def _step(directory: Path) -> int | None:
    """Of the training that wrote the checkpoint; None where it was converted."""
    identity = directory.parent / _IDENTITY
    step = read_json(identity).get("step") if identity.is_file() else None
    return step if isinstance(step, int) else None


def _fingerprint(architecture: Architecture, vocabulary: list[Any]) -> str:
    shaping = {name: value for name, value in asdict(architecture).items() if name not in _NOT_SHAPING}
    return hashlib.sha256(json.dumps([shaping, vocabulary], sort_keys=True).encode()).hexdigest()[:16]
