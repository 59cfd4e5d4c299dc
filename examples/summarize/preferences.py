"""A preference set without people: which of two sampled summaries is the better one is decided by ROUGE-L against the
reference summary, with noise on it, since people do not always agree either.

Nothing after this step sees a reference: the reward model has only the pairs, as it would have those of people.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from summarize_docstrings.evaluate import read_jsonl
from summarize_docstrings.reward import rouge_l

NOISE = 0.05  # standard deviation of an opinion about a summary, in ROUGE-L


@dataclass(frozen=True)
class Sampled:
    """A prompt, its reference summary, and one sampled summary for each seed."""

    prompt: str
    reference: str
    summaries: tuple[str, ...]


def read_samples(files: Sequence[Path]) -> list[Sampled]:
    """What ``nemo-rlhf generate`` has written for the same prompts at several seeds, one file each."""
    sampled = []
    for records in zip(*map(read_jsonl, files), strict=True):
        first = records[0]
        assert all(record["prompt"] == first["prompt"] for record in records)
        summaries = tuple(record["response"].strip() for record in records)
        sampled.append(Sampled(first["prompt"], first["reference"], summaries))
    return sampled


def compare(sampled: Sampled, generator: random.Random, noise: float = NOISE) -> list[dict[str, Any]]:
    """Pairs for ``nemo-rlhf reward``: the summaries in the order of opinions, the best with the worst, and so inwards.

    A summary stands in one pair at most. Nobody is asked about empty ones, nor about two that have
    the same ROUGE-L.
    """
    rouge = {summary: rouge_l(summary, sampled.reference) for summary in sampled.summaries if summary}
    opinions = {summary: value + generator.gauss(0.0, noise) for summary, value in rouge.items()}
    ranked = sorted(opinions, key=lambda summary: -opinions[summary])
    pairs = []
    for chosen, rejected in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
        if rouge[chosen] != rouge[rejected]:
            pairs.append(
                {
                    "prompt": sampled.prompt,
                    "chosen": as_response(chosen),
                    "rejected": as_response(rejected),
                    "rouge_l": [rouge[chosen], rouge[rejected]],
                }
            )
    return pairs


def as_response(summary: str) -> str:
    """As the policy says it: the space between prompt and summary belongs to the summary."""
    return " " + summary


def agreement(pairs: Sequence[dict[str, Any]]) -> float:
    """Share of pairs whose chosen summary also has the higher ROUGE-L: what a perfect judge would score on them."""
    return sum(chosen > rejected for chosen, rejected in (pair["rouge_l"] for pair in pairs)) / len(pairs)


def write_pairs(path: Path, samples: Iterable[Sampled], seed: int) -> list[dict[str, Any]]:
    """The pairs of all ``samples`` as jsonl; they are returned as well."""
    generator = random.Random(seed)
    pairs = [pair for sampled in samples for pair in compare(sampled, generator)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return pairs
