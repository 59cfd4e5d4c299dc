"""Reward functions for runs in tests: a plain one, ones that a test steers through files, and ones that go wrong."""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HANGS_FOR = "3599.75"


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


def misbehaving(outputs: list[str], scale: float = 1.0, **rest: Any) -> list[Any]:
    """The length of each output times ``scale``; what goes wrong where an output asks for it."""
    for output in outputs:
        if output == "exit":
            os._exit(7)
        elif output == "segfault":
            signal.raise_signal(signal.SIGSEGV)
        elif output == "hang":
            subprocess.run(["sleep", HANGS_FOR], check=True)
        elif output == "raise":
            raise KeyError("no such word")
        elif output == "odd":
            return [object()]
    return [scale * len(output) for output in outputs]


def hostile(outputs: list[str], marker: str, **rest: Any) -> list[float]:
    """What a policy's code may do that was let loose in a worker: it speaks to the run itself."""
    connection = int(sys.argv[1])
    said = {
        "pickle": struct.pack("!i", len(pickled := pickle.dumps((True, _Bomb(marker))))) + pickled,
        "pickle line": pickled + b"\n",
        "half": b"[true, 1",
        "escape": b'[false, "\\u001b[2Jraised"]\n',
    }
    if outputs[0] == "large":
        return [10**5000]
    if outputs[0] == "close":
        os.close(connection)
    elif outputs[0] in said:
        os.write(connection, said[outputs[0]])
    if outputs[0] in (*said, "close"):
        time.sleep(float(HANGS_FOR))
    return [2.0]


class _Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


async def slow_lengths(outputs: list[str], output_ids: list[list[int]], **rest: Any) -> list[Any]:
    """A number for each token, after a moment in which other samples may be scored."""
    await asyncio.sleep(0.01)
    return [[float(len(output))] * len(ids) for output, ids in zip(outputs, output_ids, strict=True)]


def vocabulary_size(samples: list[str], tokenizer: Any, **rest: Any) -> list[float]:
    return [float(len(tokenizer))] * len(samples)


def process_id(samples: list[str], **rest: Any) -> list[float]:
    return [float(os.getpid())] * len(samples)


def judged(prompts: list[str], outputs: list[str], directory: str, **rest: Any) -> list[float]:
    """What transformers says of each text: the logit of a sequence classification model at EOS."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = _judge(directory, AutoModelForSequenceClassification, AutoTokenizer)
    scores = []
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = tokenizer(f"{prompt}{output}<eos>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            scores.append(float(model(input_ids=ids).logits[0, 0]))
    return scores


@functools.cache
def _judge(directory: str, *kinds: Any) -> list[Any]:
    return [kind.from_pretrained(directory) for kind in kinds]


def exiting(prompts: list[str], **rest: Any) -> list[float]:
    os._exit(3)


def held_until_stopped(**arguments: Any) -> list[float]:
    """As ``count_a``; while the file $REWARD_HOLD exists, says so in a file beside it, a new one in each attempt of a
    job of SLURM, and waits for a signal to stop."""
    from nemo_rlhf.cli import stop

    hold = Path(os.environ["REWARD_HOLD"])
    while hold.exists() and not stop.noted():
        attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
        hold.with_suffix(f".reached_{os.environ['SLURM_JOB_NAME']}_{attempt}").touch()
        time.sleep(0.01)
    return count_a(**arguments)
