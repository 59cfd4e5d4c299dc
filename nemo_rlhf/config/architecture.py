"""What a model is, apart from its weights: the fields of a checkpoint's ``model_config.yaml``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from nemo_rlhf.untrusted import read_bytes

FILE_NAME = "model_config.yaml"
MAX_PARTS = 100_000  # layers times experts: a table of more may not fit in memory
_MAX_BYTES = 1 << 24
_NUMBERS = {  # and the least that each may be
    "num_layers": 1,
    "hidden_size": 1,
    "ffn_hidden_size": 1,
    "num_attention_heads": 1,
    "num_query_groups": 1,
    "kv_channels": 1,
    "vocab_size": 1,
    "max_position_embeddings": 1,
    "num_experts": 0,
    "experts_per_token": 0,
    "expert_ffn_hidden_size": 0,
    "ilql_num_q": 0,
    "ilql_head_width": 0,
}
_TUPLES = ("heads", "windowed_layers", "dense_layers")


@dataclass(frozen=True)
class Architecture:
    """A transformer in megatron-core's words; what has a default is as in Llama unless a family says otherwise.

    ``rope`` holds Hugging Face's ``rope_parameters`` unchanged (empty with learned positions); ``hf_config`` the whole
    ``config.json`` that the model came from, so that export gives it back. ``heads`` names what stands on the trunk
    beside or instead of the language-model head ("value"). ``dtype`` is that of the stored weights ("float32",
    "bfloat16").

    ``zero_centered_norm``: norms multiply by 1 + weight (Gemma). ``qkv_bias`` and ``linear_bias``: biases of query, key
    and value only, or of every linear layer. ``qk_norm``: query and key heads are normed before they are rotated.
    ``windowed_layers``: numbers of the layers in which a token sees itself and the ``sliding_window - 1`` before it
    only. ``embedding_scale`` multiplies embeddings (Gemma).

    ``num_experts`` > 0: the feed-forward part of every layer but ``dense_layers`` is a mixture of experts
    ``expert_ffn_hidden_size`` wide, of which a token visits ``experts_per_token``; ``normalize_expert_weights``: the
    weights of those sum to one.

    ``ilql_num_q`` Q heads (and a V head), each with a hidden layer ``ilql_head_width`` wide, where "ilql" is among the
    ``heads``, on a trunk of their own with ``ilql_value_trunk``. ``score_mean`` and ``score_std``: of a reward model's
    scores on held-out texts."""

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    rope: dict[str, Any]
    tie_embeddings: bool
    initializer_range: float = 0.02
    dtype: str = "float32"
    heads: tuple[str, ...] = ()
    hf_config: dict[str, Any] = field(default_factory=dict)
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    zero_centered_norm: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    position_embedding: Literal["rope", "learned"] = "rope"
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    embedding_scale: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    normalize_expert_weights: bool = True
    dense_layers: tuple[int, ...] = ()
    ilql_num_q: int = 0
    ilql_head_width: int = 0
    ilql_value_trunk: bool = False
    score_mean: float = 0.0
    score_std: float = 1.0

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward part of this layer, counted from 0, is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def save(self, directory: Path) -> None:
        data = asdict(self)
        data |= {name: list(data[name]) for name in _TUPLES}
        (Path(directory) / FILE_NAME).write_text(yaml.safe_dump(data, sort_keys=False))

    @classmethod
    def load(cls, directory: Path) -> Architecture:
        """Raises ValueError when the file is missing or is not an architecture."""
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{directory} is not a Megatron checkpoint: it has no {FILE_NAME}.")
        content = read_bytes(path, _MAX_BYTES)
        try:
            data = yaml.safe_load(content)
            found = cls(**{**data, **{name: tuple(data.get(name, ())) for name in _TUPLES}})
            found._check()
            return found
        except (TypeError, AttributeError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = (
                " ".join(str(error).split())[:300] if not isinstance(error, RecursionError) else "nested too deeply"
            )
            raise ValueError(
                f"{path} does not describe a model ({reason}): restore the file or convert again."
            ) from None

    def _check(self) -> None:
        """Raises ValueError for values that no model has, of which some would take all memory."""
        for name, least in _NUMBERS.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={str(value)[:60]!r} must be a whole number, {least} or more")
        if self.num_layers * max(1, self.num_experts) > MAX_PARTS:
            raise ValueError(f"{self.num_layers} layers and {self.num_experts} experts in each are more than any has")
        for name, kind in {
            "family": str,
            "dtype": str,
            "rope": dict,
            "hf_config": dict,
            "tie_embeddings": bool,
        }.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}={str(getattr(self, name))[:60]!r} is of another type")
        if not all(isinstance(layer, int) for layer in (*self.windowed_layers, *self.dense_layers)):
            raise ValueError("windowed_layers and dense_layers must be numbers")
