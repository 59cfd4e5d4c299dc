"""Padding to few shapes, on GPUs alone: on a CPU, where nothing is planned, it would only be computed on."""

from __future__ import annotations

from nemo_rlhf import device
from nemo_rlhf.config.buckets import bucket_length, bucket_rows


def pads() -> bool:
    return device.is_cuda()


def padded_length(length: int, limit: int, multiple_of: int = 1) -> int:
    """Tokens that rows of up to ``length`` tokens are padded to: a multiple of ``multiple_of``, and of more than
    ``limit`` only where ``length`` itself asks for it."""
    if pads():
        length = max(length, min(bucket_length(length), limit))
    return -(-length // multiple_of) * multiple_of


def padded_rows(rows: int) -> int:
    return bucket_rows(rows) if pads() else rows
