"""Prompts to requests: which continuations to sample, and who samples them."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_rlhf.types import Prompt, Request, Sample


def make_requests(prompts: Sequence[Prompt], samples_per_prompt: int, first_index: int) -> list[Request]:
    """``samples_per_prompt`` requests for each prompt, numbered from ``first_index`` on: the number keys the noise."""
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    return [Request(prompt, first_index + place) for place, prompt in enumerate(repeated)]


def in_order(parts: Sequence[Sequence[Sample]]) -> tuple[Sample, ...]:
    """The samples of every data-parallel rank as one rollout, in the order of their indices."""
    return tuple(sorted((sample for part in parts for sample in part), key=lambda sample: sample.sample_index))
