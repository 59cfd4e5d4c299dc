"""The numbers of the overview: how much is done by whom, how far people agree, and what the reward model learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_rlhf.feedback.agreement import alpha
from nemo_rlhf.feedback.records import Refresh, Throughput
from nemo_rlhf.feedback.store import Store

NUM_DAYS = 7
_WIDTH, _HEIGHT = 880, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 14, 32


@dataclass(frozen=True)
class Worker:
    """What one annotator did: answers on each of the days shown, and over all days."""

    name: str
    simulated: bool
    by_day: list[int]
    answers: int
    mean_seconds: float


@dataclass(frozen=True)
class Chart:
    """Accuracies by policy step, in the units of an SVG of ``width`` by ``height``."""

    width: int
    height: int
    left: int
    right: int
    bottom: int
    rows: list[tuple[float, str]]  # grid lines: y and label
    columns: list[tuple[float, str]]  # ticks: x and label
    before: str  # points of a line
    after: str
    dots: list[tuple[float, float, bool, str]]  # of the line after: x, y, accepted, what it is


@dataclass(frozen=True)
class Figures:
    """All that the overview shows."""

    open_tasks: int
    comparisons: int
    simulated: int  # of the comparisons
    mean_seconds: float | None
    alpha: float | None
    compared_tasks: int  # that alpha is about: those with two answers or more
    days: list[str]  # the last first
    workers: list[Worker]
    refreshes: list[Refresh]
    chart: Chart | None


def figures(store: Store, run_id: int) -> Figures:
    done = store.throughput(run_id)
    votes = store.votes(run_id)
    days = sorted({one.day for one in done}, reverse=True)[:NUM_DAYS]
    refreshes = store.refreshes(run_id)
    num = sum(one.answers for one in done)
    answers_of: dict[int, int] = {}
    for vote in votes:
        answers_of[vote.task_id] = answers_of.get(vote.task_id, 0) + 1
    return Figures(
        open_tasks=store.queue_length(run_id),
        comparisons=num,
        simulated=sum(one.answers for one in done if one.simulated),
        mean_seconds=sum(one.answers * one.mean_seconds for one in done) / num if num else None,
        alpha=alpha(votes),
        compared_tasks=sum(count > 1 for count in answers_of.values()),
        days=days,
        workers=_workers(done, days),
        refreshes=refreshes,
        chart=chart(refreshes),
    )


def _workers(done: Sequence[Throughput], days: Sequence[str]) -> list[Worker]:
    by_name: dict[str, list[Throughput]] = {}
    for one in done:
        by_name.setdefault(one.annotator, []).append(one)
    workers = []
    for name, own in by_name.items():
        answers = sum(one.answers for one in own)
        by_day = [sum(one.answers for one in own if one.day == day) for day in days]
        mean_seconds = sum(one.answers * one.mean_seconds for one in own) / answers
        workers.append(Worker(name, own[0].simulated, by_day, answers, mean_seconds))
    return sorted(workers, key=lambda worker: (-worker.answers, worker.name))


def chart(refreshes: Sequence[Refresh]) -> Chart | None:
    """None where no refresh had held-out pairs."""
    judged = [one for one in refreshes if math.isfinite(one.accuracy_before) and math.isfinite(one.accuracy_after)]
    if not judged:
        return None
    values = [value for one in judged for value in (one.accuracy_before, one.accuracy_after)]
    low, high = math.floor(min(values) * 10) / 10, math.ceil(max(values) * 10) / 10
    if high - low < 0.2:
        low, high = max(0.0, high - 0.2), max(high, 0.2)
    steps = [one.step for one in judged]
    first, last = min(steps), max(*steps, min(steps) + 1)

    def x(step: int) -> float:
        return round(_LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(accuracy: float) -> float:
        return round(_HEIGHT - _BOTTOM - (accuracy - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    num_rows = round((high - low) * 10)
    every = 1 if num_rows <= 5 else 2
    rows = [low + index / 10 for index in range(0, num_rows + 1, every)]
    ticks = _round_steps(first, last)
    return Chart(
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        right=_WIDTH - _RIGHT,
        bottom=_HEIGHT - _BOTTOM,
        rows=[(y(value), f"{100 * value:.0f} %") for value in rows],
        columns=[(x(step), f"{step:,}") for step in ticks],
        before=" ".join(f"{x(one.step)},{y(one.accuracy_before)}" for one in judged),
        after=" ".join(f"{x(one.step)},{y(one.accuracy_after)}" for one in judged),
        dots=[(x(one.step), y(one.accuracy_after), one.accepted, _describe(one)) for one in judged],
    )


def _round_steps(first: int, last: int) -> list[int]:
    """At most nine steps of an axis, a round number apart."""
    apart = 10 ** max(0, math.floor(math.log10(last - first)) - 1)
    for factor in (1, 2, 5, 10, 20, 50):
        if (last - first) / (apart * factor) <= 8:
            apart *= factor
            break
    return list(range(-(-first // apart) * apart, last + 1, apart))


def _describe(one: Refresh) -> str:
    accuracies = f"{one.accuracy_before:.1%} before, {one.accuracy_after:.1%} after, on {one.held_out} held out"
    return f"Step {one.step}: {accuracies}, {'accepted' if one.accepted else 'not accepted'}"
