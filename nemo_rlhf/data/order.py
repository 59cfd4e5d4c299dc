"""In which order records are visited: a function of the seed and the position, so that there is no state to save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

WORD = 2**64


class Order:
    """Indices 0..size-1 over and over, in a new permutation each time round (or in order, without ``shuffle``)."""

    def __init__(self, size: int, seed: int, shuffle: bool):
        assert size > 0
        self._size = size
        self._seed = seed
        self._shuffle = shuffle
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, step: int, batch_size: int) -> list[int]:
        """The ``batch_size`` indices of step ``step`` (from 0). Batches run on over the end of an epoch."""
        assert step >= 0 and batch_size > 0
        positions = range(step * batch_size, (step + 1) * batch_size)
        return [int(self._epoch(position // self._size)[position % self._size]) for position in positions]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch seldom spans more than two, and any of them can be made again
                self._epochs.clear()
            # Philox is counter-based: each (seed, epoch) is a stream of its own.
            key = np.array([self._seed % WORD, epoch], dtype=np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key))
            self._epochs[epoch] = generator.permutation(self._size) if self._shuffle else np.arange(self._size)
        return self._epochs[epoch]


Record = TypeVar("Record")


class Stream(Generic[Record]):
    """An endless, shuffled sequence of records (texts, dialogues), cut into batches of ``batch_size``."""

    def __init__(self, records: Sequence[Record], batch_size: int, seed: int, shuffle: bool = True):
        self._records = records
        self._batch_size = batch_size
        self._order = Order(len(records), seed, shuffle)

    def num_steps(self, epochs: int) -> int:
        """Batches that visit every record at least ``epochs`` times."""
        return -(-epochs * len(self._records) // self._batch_size)

    def batch(self, step: int) -> list[Record]:
        """The records of step ``step`` (from 0): a function of the seed and the step alone."""
        return [self._records[index] for index in self._order.batch(step, self._batch_size)]
