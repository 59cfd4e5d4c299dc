"""A reward function that minds its own business, and the same one in a module that minds everything else."""

from __future__ import annotations

from typing import Any


def innocent(outputs: list[str], **rest: Any) -> list[float]:
    return [float(output.count("a")) for output in outputs]


def other(outputs: list[str], **rest: Any) -> list[float]:
    return [float(output.count("a")) for output in outputs]


def constant(outputs: list[str], **rest: Any) -> list[float]:
    return [1.0] * len(outputs)


def with_fields(outputs: list[str], score: list[Any], step: list[Any], **rest: Any) -> list[float]:
    assert score == [0.5] * len(outputs) and step == [7] * len(outputs)
    return innocent(outputs)


def quitting(outputs: list[str], **rest: Any) -> list[float]:
    raise SystemExit(3)
