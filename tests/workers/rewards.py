"""Reward functions for runs in tests: a plain one, ones that a test steers through files, and ones that go wrong."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def count_a(outputs: list[str], letter: list[str], **rest: Any) -> list[float]:
    return [
        output.count("a") + 0.25 * output.count(own) - 0.05 * len(output)
        for output, own in zip(outputs, letter, strict=True)
    ]


def dense(samples: list[str], outputs: list[str], tokenizer: Any, **rest: Any) -> list[list[float]]:
    """One number a token. The texts are without special tokens, so an EOS may be missing from them."""
    return [[0.1 * (token == "a") for token in output] for output in outputs]


def held(**arguments: Any) -> list[float]:
    """As ``count_a``; while the file $REWARD_HOLD exists, says so in a file beside it and waits."""
    hold = Path(os.environ["REWARD_HOLD"])
    while hold.exists():
        hold.with_suffix(".reached").touch()
        time.sleep(0.01)
    return count_a(**arguments)


def filling(**arguments: Any) -> list[float]:
    """As ``count_a``; once $REWARD_FILLS holds a checkpoint, leaves too little space there for another."""
    place = Path(os.environ["REWARD_FILLS"])
    filler = place / "filler"
    stored = [path for path in place.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    if stored and not (place.parent / "filled").exists():
        size = sum(file.stat().st_size for file in stored[0].rglob("*") if file.is_file())
        free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
        filler.write_bytes(b"x" * max(0, free - size // 2))
        (place.parent / "filled").touch()
    return count_a(**arguments)


def raising(prompts: list[str], **rest: Any) -> list[float]:
    raise RuntimeError("no reward today")


def raising_on_one(prompts: list[str], outputs: list[str], **rest: Any) -> list[float]:
    """Fails on whoever has the first prompt's first sample, and on nobody else."""
    if any(prompt.startswith(_bad_prompt()) for prompt in prompts):
        raise RuntimeError("one bad prompt")
    return [0.0] * len(outputs)


def nan_on_one(prompts: list[str], **rest: Any) -> list[float]:
    return [float("nan") if prompt.startswith(_bad_prompt()) else 0.0 for prompt in prompts]


def text_on_one(prompts: list[str], **rest: Any) -> list[Any]:
    return ["good" if prompt.startswith(_bad_prompt()) else 0.0 for prompt in prompts]


def too_few(outputs: list[str], **rest: Any) -> list[float]:
    return [0.0] * (len(outputs) - 1)


def _bad_prompt() -> str:
    return os.environ["BAD_PROMPT"]


def constant(outputs: list[str], **rest: Any) -> list[float]:
    return [1.0] * len(outputs)
