"""ROUGE-L against the reference summary: the reward that PPO raises and the figure that evaluation reports."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
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
    *,
    reference: Sequence[str],
    output_ids: Sequence[Sequence[int]] | None = None,
    **metadata: Any,
) -> list[float] | list[list[float]]:
    """ROUGE-L of each output; ``reference`` is the field of that name in the prompts file.

    With the tokens of the outputs in ``output_ids``, what each token adds to it: the sum is the same, and PPO learns
    sooner which words earned it. Differences of a potential do not change which policy is best (Ng et al. 1999).
    """
    if output_ids is None:
        return [rouge_l(output, target) for output, target in zip(outputs, reference, strict=True)]
    return [token_gains(ids, target, tokenizer) for ids, target in zip(output_ids, reference, strict=True)]


def token_gains(token_ids: Sequence[int], reference: str, tokenizer: Any) -> list[float]:
    """ROUGE-L of the text up to each token, less that of the text before it."""
    texts = (tokenizer.decode(list(token_ids[:end]), skip_special_tokens=True) for end in range(len(token_ids) + 1))
    return [after - before for before, after in pairwise(rouge_l(text, reference) for text in texts)]
