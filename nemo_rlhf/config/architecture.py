"""What a model is, apart from its weights: the fields of a checkpoint's ``model_config.yaml``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

FILE_NAME = "model_config.yaml"


@dataclass(frozen=True)
class Architecture:
    """A transformer in megatron-core's words. ``rope`` holds Hugging Face's ``rope_parameters`` unchanged;
    ``hf_config`` the whole ``config.json`` that the model came from, so that export gives it back.
    ``heads`` names what stands on the trunk beside or instead of the language-model head ("value").
    ``dtype`` is that of the stored weights ("float32", "bfloat16")."""

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

    def save(self, directory: Path) -> None:
        data = asdict(self)
        data["heads"] = list(self.heads)
        (Path(directory) / FILE_NAME).write_text(yaml.safe_dump(data, sort_keys=False))

    @classmethod
    def load(cls, directory: Path) -> Architecture:
        """Raises ValueError when the file is missing or is not an architecture."""
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{directory} is not a Megatron checkpoint: it has no {FILE_NAME}.")
        try:
            data = yaml.safe_load(path.read_text())
            return cls(**{**data, "heads": tuple(data.get("heads", ()))})
        except (TypeError, AttributeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path} does not describe a model ({error}): restore the file or convert again."
            ) from None
