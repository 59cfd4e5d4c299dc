"""Lengths and numbers of rows that GPUs are given: few, because their libraries plan anew for each shape.

cuDNN's fused attention, Transformer Engine's first choice on Hopper GPUs, builds a plan for each combination of batch
and sequence lengths, forwards and backwards, which takes longer than many a step.
"""

from __future__ import annotations

SMALLEST_STEP = 128  # tokens
STEPS_AN_OCTAVE = 8


def bucket_length(length: int) -> int:
    """The smallest bucket of at least ``length`` tokens: multiples of 128 up to 2048, of 256 up to 4096, and so on,
    eight for each doubling. Beyond 1024 tokens it is at most an eighth longer than asked for."""
    below = bucket_rows(length) // 2  # the largest power of two below length
    step = max(SMALLEST_STEP, below // STEPS_AN_OCTAVE)
    return -(-length // step) * step


def bucket_rows(rows: int) -> int:
    """The smallest power of two of at least ``rows``."""
    return 1 << max(0, rows - 1).bit_length()
