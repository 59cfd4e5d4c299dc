"""What ``nemo-rlhf data`` is told: the tokenizer, and those keys of ``data`` on which it depends what is learned."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_rlhf.config.schema import DataConfig


@dataclass
class TokenizerOfConfig:
    restore_from: str | None = None  # the model that is to be trained, for its tokenizer; null: none
    tokenizer: str | None = None  # directory of another tokenizer; both null: lengths are in characters


@dataclass
class ReadDataConfig(DataConfig):
    max_prompt_length: int = 1024  # tokens; a longer prompt is an error
    max_sequence_length: int = 2048  # tokens of prompt and response
    train_on: str = "response"  # tokens that are learned in SFT: "response" | "all"


@dataclass
class DataCommandConfig:
    """Configuration of ``nemo-rlhf data``."""

    model: TokenizerOfConfig = field(default_factory=TokenizerOfConfig)
    data: ReadDataConfig = field(default_factory=ReadDataConfig)
