"""Who sits in which slot: requests wait in a queue and take the slots of finished sequences.

Nothing here knows of tensors or processes. Every pipeline stage runs the same scheduler on the same sampled tokens, so
all of them know what comes next without asking.

The sequences of a group always hold its first slots, without gaps: a decoding step then reads a plain slice of the
key-value cache. When a sequence ends, the last one moves into its slot.

A sequence may have several turns: what somebody else says after one is appended to the slot's cache, which is kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemo_rlhf.generation.ending import Ending
from nemo_rlhf.generation.sampling import INVALID_TOKEN
from nemo_rlhf.parallel.shapes import padded_length, padded_rows
from nemo_rlhf.types import FinishReason, Request, Sample

REFILL_SHARE = 0.125  # of a group's slots must be free before a prefill interrupts its decoding
PREFILL_TOKENS = 16384  # padded tokens of one prefill at most, which bounds its activations

# Given turns that have ended just now: for each, what follows it before the next turn, or None where that was the last.
GoOn = Callable[[Sequence[Sample]], Sequence[Sequence[int] | None]]


@dataclass
class Running:
    """A request that holds a slot. ``context``: what precedes this turn, the prompt to begin with, of which ``cached``
    tokens are in the cache; ``response``: what was sampled in this turn so far."""

    order: int
    request: Request
    context: tuple[int, ...]
    cached: int = 0
    response: list[int] = field(default_factory=list)
    finished: FinishReason | None = None

    @property
    def new_ids(self) -> tuple[int, ...]:
        """What has to be run before the turn's first token is drawn."""
        return self.context[self.cached :]

    @property
    def length(self) -> int:
        return len(self.context) + len(self.response)

    def next_turn(self, following: Sequence[int]) -> None:
        self.cached = self.length - 1  # the last token was drawn, but not run
        self.context = (*self.context, *self.response, *following)
        self.response, self.finished = [], None


@dataclass(frozen=True)
class Work:
    """One forward pass of a group over ``rows``, which sit in ``slots``. A prefill runs their prompts, an append what
    followed their last turns, a decoding step the last token of each. Each draws one token a row. Only the slots of an
    append need not lie side by side."""

    rows: tuple[Running, ...]
    slots: tuple[int, ...]
    prefill: bool = False
    append: bool = False

    @property
    def first_slot(self) -> int:
        return self.slots[0]


@dataclass
class _Group:
    num_slots: int
    running: list[Running] = field(default_factory=list)


class Scheduler:
    """Assigns requests to ``num_slots`` slots in ``num_groups`` groups. At most one piece of work a group is under way:
    take it with ``next_work``, hand its tokens to ``record``. Without ``go_on`` a sequence has one turn."""

    def __init__(
        self,
        requests: Sequence[Request],
        ending: Ending,
        num_slots: int,
        num_groups: int = 1,
        go_on: GoOn | None = None,
    ) -> None:
        self._ending = ending
        self._go_on = go_on
        # prompts of similar length are filled in together, which saves padding; long ones first, as they may end last
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt.token_ids))
        self._queue = deque(Running(index, requests[index], requests[index].prompt.token_ids) for index in order)
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
        """The last turn of each sequence, in the order of the requests."""
        done = tuple(sample for sample in self._samples if sample is not None)
        assert len(done) == len(self._samples)
        return done

    def next_work(self, group: int) -> Work | None:
        """The group's next forward pass, or None when there is nothing for it to do."""
        place = self._groups[group]
        if self._should_refill(place):
            first_slot = len(place.running)
            place.running += self._take(place.num_slots - first_slot)
            return Work(tuple(place.running[first_slot:]), tuple(range(first_slot, len(place.running))), prefill=True)
        waiting = [slot for slot, row in enumerate(place.running) if not row.response]
        if waiting:
            waiting = _bounded(waiting, place.running)
            return Work(tuple(place.running[slot] for slot in waiting), tuple(waiting), append=True)
        return Work(tuple(place.running), tuple(range(len(place.running)))) if place.running else None

    def record(self, group: int, work: Work, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """Append each row's token, release the slots of finished ones; returns the moves (from slot, to slot) that
        close the gaps.

        Raises:
            ValueError: a token is not one: the model's logits were NaN; or what ``go_on`` raises.
        """
        ended = []
        for row, token in zip(work.rows, tokens, strict=True):
            if token == INVALID_TOKEN:
                raise ValueError(
                    f"The model gives NaN logits after {row.length} tokens of sample {row.request.sample_index}: "
                    "its weights are damaged or overflow in this precision."
                )
            row.response.append(token)
            row.finished = self._ending.reason(row.response)
            if row.finished is not None:
                ended.append((row, self._sample(row, row.finished)))
        if not ended:
            return []
        following = self._go_on([sample for _, sample in ended]) if self._go_on else [None] * len(ended)
        for (row, sample), more in zip(ended, following, strict=True):
            if more is None:
                self._samples[row.order] = sample
            else:
                row.next_turn(more)
        return _close_gaps(self._groups[group].running)

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
            longest = len(taken[0].new_ids) if taken else 0
            if taken and _pass_tokens(len(taken) + 1, longest) > PREFILL_TOKENS:
                break
            taken.append(self._queue.popleft())
        return taken


def _pass_tokens(rows: int, longest: int) -> int:
    """Of one pass, with what it is padded by."""
    return padded_rows(rows) * padded_length(longest, PREFILL_TOKENS)


def _bounded(waiting: Sequence[int], running: Sequence[Running]) -> list[int]:
    """As many of them as one pass may hold, the others in the next."""
    taken: list[int] = []
    longest = 0
    for slot in waiting:
        longest = max(longest, len(running[slot].new_ids))
        if taken and longest * (len(taken) + 1) > PREFILL_TOKENS:
            break
        taken.append(slot)
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
