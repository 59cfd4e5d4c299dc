"""Rows of different lengths to one right-padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rlhf.types import Dialogue, Sample, Text

Batch = tuple[Tensor, Tensor, Tensor]


def pad_tokens(rows: Sequence[Sequence[int]], pad_id: int, multiple_of: int = 1) -> Batch:
    """Right-padded ``tokens`` (int64) [rows, sequence], ``mask`` (bool, same shape, True on tokens) and ``lengths``
    (int64) [rows]. ``sequence`` is that of the longest row, rounded up to ``multiple_of``."""
    return _pad(rows, [[True] * len(row) for row in rows], pad_id, multiple_of)


def pad_for_scores(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """As ``pad_tokens``, with the mask True on each row's last token, which is where a reward model scores it."""
    return _pad(rows, [[False] * (len(row) - 1) + [True] for row in rows], pad_id, 1)


def pad_texts(texts: Sequence[Text], pad_id: int, multiple_of: int = 1) -> Batch:
    """As ``pad_tokens``, with the texts' ``loss_mask`` as the mask."""
    return _pad([text.token_ids for text in texts], [text.loss_mask for text in texts], pad_id, multiple_of)


def pad_samples(samples: Sequence[Sample], pad_id: int, multiple_of: int = 1) -> Batch:
    """As ``pad_tokens`` for prompt and response together, with the mask True on sampled tokens (EOS included)."""
    rows = [sample.prompt.token_ids + sample.response_ids for sample in samples]
    sampled = [s.action_mask or [True] * len(s.response_ids) for s in samples]
    masks = [[False] * len(s.prompt.token_ids) + [*mask] for s, mask in zip(samples, sampled, strict=True)]
    return _pad(rows, masks, pad_id, multiple_of)


def pad_dialogues(dialogues: Sequence[Dialogue], pad_id: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``pad_tokens``, with the dialogues' ``action_mask`` as the mask; and ``rewards`` (fp32) [rows, sequence]."""
    tokens, mask, lengths = _pad([d.token_ids for d in dialogues], [d.action_mask for d in dialogues], pad_id, 1)
    rewards = torch.zeros(tokens.shape)
    for index, dialogue in enumerate(dialogues):
        rewards[index, : len(dialogue.rewards)] = torch.tensor(dialogue.rewards)
    return tokens, mask, lengths, rewards


def _pad(rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], pad_id: int, multiple_of: int) -> Batch:
    assert multiple_of > 0
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    longest = int(lengths.max()) if len(rows) else 0
    width = -(-longest // multiple_of) * multiple_of
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, (row, learned) in enumerate(zip(rows, masks, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = torch.tensor(learned, dtype=torch.bool)
    return tokens, mask, lengths
