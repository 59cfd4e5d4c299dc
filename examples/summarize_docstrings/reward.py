"""ROUGE-L against the reference summary: the reward that PPO raises and the figure that evaluation reports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from rouge_score import rouge_scorer


@cache
def _scorer() -> rouge_scorer.RougeScorer:
    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)


def rouge_l(summary: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, between 0 and 1 (Lin 2004)."""
    return float(_scorer().score(reference, summary)["rougeL"].fmeasure)


def reward_fn(
    samples: Sequence[str],
    prompts: Sequence[str],
    outputs: Sequence[str],
    tokenizer: Any,
    reference: Sequence[str],
    **metadata: Any,
) -> list[float]:
    """ROUGE-L of each output; ``reference`` is the field of that name in the prompts file."""
    return [rouge_l(output, target) for output, target in zip(outputs, reference, strict=True)]
