"""Who sits in which slot: requests wait in a queue and take the slots of finished sequences.

Nothing here knows of tensors or processes. Every pipeline stage runs the same scheduler on the same sampled tokens, so
all of them know what comes next without asking.

The sequences of a group always hold its first slots, without gaps: a decoding step then reads a plain slice of the
key-value cache. When a sequence ends, the last one moves into its slot.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_rlhf.generation.ending import Ending
from nemo_rlhf.generation.sampling import INVALID_TOKEN
from nemo_rlhf.types import FinishReason, Request, Sample

REFILL_SHARE = 0.125  # of a group's slots must be free before a prefill interrupts its decoding
PREFILL_TOKENS = 16384  # padded tokens of one prefill at most, which bounds its activations


@dataclass
class Running:
    """A request that holds a slot, with what was sampled for it so far."""

    order: int
    request: Request
    response: list[int] = field(default_factory=list)
    finished: FinishReason | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.request.prompt.token_ids

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response)


@dataclass(frozen=True)
class Work:
    """One forward pass of a group: ``rows`` sit in its slots from ``first_slot`` on. A prefill runs their prompts, a
    decoding step the last token of each. Either draws one token a row."""

    rows: tuple[Running, ...]
    first_slot: int
    prefill: bool


@dataclass
class _Group:
    num_slots: int
    running: list[Running] = field(default_factory=list)


class Scheduler:
    """Assigns requests to ``num_slots`` slots in ``num_groups`` groups. At most one piece of work a group is under way:
    take it with ``next_work``, hand its tokens to ``record``."""

    def __init__(self, requests: Sequence[Request], ending: Ending, num_slots: int, num_groups: int = 1) -> None:
        self._ending = ending
        # prompts of similar length are filled in together, which saves padding; long ones first, as they may end last
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt.token_ids))
        self._queue = deque(Running(index, requests[index]) for index in order)
        self._samples: list[Sample | None] = [None] * len(requests)
        share, rest = divmod(min(num_slots, len(requests)), num_groups)
        self._groups = [_Group(share + (index < rest)) for index in range(num_groups)]

    @property
    def group_sizes(self) -> list[int]:
        return [group.num_slots for group in self._groups]

    @property
    def finished(self) -> bool:
        return not self._queue and not any(group.running for group in self._groups)

    def samples(self) -> tuple[Sample, ...]:
        """In the order of the requests."""
        done = tuple(sample for sample in self._samples if sample is not None)
        assert len(done) == len(self._samples)
        return done

    def next_work(self, group: int) -> Work | None:
        """The group's next forward pass, or None when there is nothing for it to do."""
        place = self._groups[group]
        if self._should_refill(place):
            first_slot = len(place.running)
            place.running += self._take(place.num_slots - first_slot)
            return Work(tuple(place.running[first_slot:]), first_slot, prefill=True)
        return Work(tuple(place.running), 0, prefill=False) if place.running else None

    def record(self, group: int, work: Work, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Append each row's token, release the slots of finished ones; returns the moves (from slot, to slot) that
        close the gaps.

        Raises:
            ValueError: a token is not one: the model's logits were NaN.
        """
        any_finished = False
        for row, token in zip(work.rows, tokens, strict=True):
            if token == INVALID_TOKEN:
                raise ValueError(
                    f"The model gives NaN logits after {row.length} tokens of sample {row.request.sample_index}: "
                    "its weights are damaged or overflow in this precision."
                )
            row.response.append(token)
            row.finished = self._ending.reason(row.response)
            if row.finished is not None:
                any_finished = True
                self._samples[row.order] = self._sample(row, row.finished)
        return _close_gaps(self._groups[group].running) if any_finished else []

    def _sample(self, row: Running, reason: FinishReason) -> Sample:
        text = self._ending.text(row.response, reason)
        return Sample(row.request.prompt, row.request.sample_index, tuple(row.response), text, reason)

    def _should_refill(self, group: _Group) -> bool:
        free = group.num_slots - len(group.running)
        if not self._queue or not free:
            return False
        enough = min(len(self._queue), max(1, math.ceil(REFILL_SHARE * group.num_slots)))
        return free >= enough or not group.running

    def _take(self, count: int) -> list[Running]:
        taken: list[Running] = []
        while self._queue and len(taken) < count:
            # the first is the longest of them, to which the others are padded
            longest = len(taken[0].prompt_ids) if taken else 0
            if taken and longest * (len(taken) + 1) > PREFILL_TOKENS:
                break
            taken.append(self._queue.popleft())
        return taken


def _close_gaps(running: list[Running]) -> list[tuple[int, int]]:
    left = sum(row.finished is None for row in running)
    gaps = [slot for slot in range(left) if running[slot].finished is not None]
    sources = [slot for slot in range(left, len(running)) if running[slot].finished is None]
    moves = list(zip(sources, gaps, strict=True))
    for source, gap in moves:
        running[gap] = running[source]
    del running[left:]
    return moves
