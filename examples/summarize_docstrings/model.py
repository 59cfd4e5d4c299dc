"""The tokenizer and the shape of the model, as a Hugging Face directory that ``model.restore_from`` takes.

With ``model.init=random`` training starts from random weights of its ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY_SIZE = 6144
PAD, EOS = "<pad>", "<eos>"
MAX_POSITIONS = 256


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be encoded and comes back unchanged. It adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A Llama of about four and a half million parameters whose heads and groups tensor parallelism 2 and 4 divide."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,  # from scratch in a few hundred steps: 0.02 learns much slower at this width
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def cut(tokenizer: PreTrainedTokenizerFast, text: str, max_tokens: int) -> str:
    """The longest prefix of whole words that encodes to at most ``max_tokens`` tokens."""
    while True:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if len(encoding["input_ids"]) <= max_tokens:
            return text
        end = encoding["offset_mapping"][max_tokens][0]
        prefix, rest = text[:end], text[end:]
        in_word = " " not in (prefix[-1:], rest[0])
        text = (prefix.rpartition(" ")[0] or prefix if in_word else prefix).rstrip()


def save(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write ``tokenizer*.json`` and ``config.json``."""
    tokenizer.save_pretrained(directory)
    model_config(tokenizer).save_pretrained(directory)
