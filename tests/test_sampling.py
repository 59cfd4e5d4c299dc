"""The sampler draws from the right distribution, and what it draws depends on nothing but whose token it is."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_rlhf.generation import sampling as module
from nemo_rlhf.generation.sampling import INVALID_TOKEN, SamplingParams, sample_tokens


def draw(logits: Tensor, sampling: SamplingParams, *, vocab_size: int | None = None, first_sample: int = 0) -> Tensor:
    """Row i is the token of sample ``first_sample + i`` at position 7."""
    return sample_tokens(
        logits,
        vocab_start=0,
        vocab_size=vocab_size or logits.size(1),
        sampling=sampling,
        sample_index=first_sample + torch.arange(logits.size(0)),
        position=torch.full((logits.size(0),), 7),
    )


def draw_in_shards(logits: Tensor, vocab_size: int, shards: int, sampling: SamplingParams, **row: Any) -> Tensor:
    """What ``shards`` tensor-parallel ranks compute, one after the other, their collectives done by hand."""
    parts = [
        part[:, : max(vocab_size - start, 0)] / (sampling.temperature or 1.0) for start, part in cut(logits, shards)
    ]
    width = logits.size(1) // shards
    if sampling.temperature and module.filters(sampling, vocab_size):
        told = [module.candidates(part, width, sampling) for part in parts]
        assert len({tuple(part.shape) for part in told}) == 1  # an all-gather needs equal shapes
        least = module.cutoff(torch.cat(told, dim=1), sampling)
        parts = [part.masked_fill(part < least, -torch.inf) for part in parts]
    if sampling.temperature:
        keys = module.row_keys(sampling.seed, **row)
        parts = [module.add_noise(part, keys, rank * width) for rank, part in enumerate(parts)]
    return module.winner(torch.stack([module.local_best(part, rank * width) for rank, part in enumerate(parts)]))


def cut(logits: Tensor, shards: int) -> list[tuple[int, Tensor]]:
    width = logits.size(1) // shards
    return [(rank * width, logits[:, rank * width : (rank + 1) * width]) for rank in range(shards)]


def chi_square_z(counts: Tensor, probabilities: Tensor) -> float:
    """Standard score of Pearson's statistic, whose chi-square distribution is nearly normal for many categories."""
    expected = probabilities.double() * counts.sum()
    assert expected.min() > 5
    freedom = counts.numel() - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("varies", ["samples", "positions", "seeds"])
def test_frequencies_follow_the_softmax(temperature: float, varies: str) -> None:
    count, logits = 40_000, torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.2
    zeros, numbers = torch.zeros(count, dtype=torch.long), torch.arange(count)
    rows = {
        "sample_index": numbers if varies == "samples" else zeros,
        "position": numbers if varies == "positions" else zeros,
    }
    if varies == "seeds":
        rows = {"sample_index": numbers % 200, "position": zeros}
    drawn = []
    for seed in range(200) if varies == "seeds" else [3]:
        part = {name: value[:200] if varies == "seeds" else value for name, value in rows.items()}
        batch = logits.expand(part["position"].numel(), -1)
        sampling = SamplingParams(1, temperature=temperature, seed=seed)
        drawn.append(sample_tokens(batch, vocab_start=0, vocab_size=40, sampling=sampling, **part))
    counts = torch.bincount(torch.cat(drawn), minlength=40)
    assert chi_square_z(counts, (logits / temperature).softmax(0)) < 3.5


@pytest.mark.parametrize("neighbour", ["position", "sample_index", "seed"])
def test_neighbouring_draws_are_independent(neighbour: str) -> None:
    """The joint frequencies of two draws that differ by one in position, sample or seed are the product's."""
    count, probabilities = 60_000, torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = probabilities.log().expand(count, -1)
    index = torch.arange(count)
    pair = []
    for step in (0, 1):
        rows = {"sample_index": index // 200 * 2, "position": index % 200 * 2}
        if neighbour != "seed":
            rows[neighbour] = rows[neighbour] + step
        sampling = SamplingParams(1, seed=11 + step * (neighbour == "seed"))
        pair.append(sample_tokens(logits, vocab_start=0, vocab_size=4, sampling=sampling, **rows))
    counts = torch.bincount(pair[0] * 4 + pair[1], minlength=16)
    assert chi_square_z(counts, torch.outer(probabilities, probabilities).flatten()) < 3.5


def test_unlikely_tokens_are_drawn_as_often_as_they_should() -> None:
    """The noise must be fine where it wins: a token of probability 2e-5 among 100 000 x 20 draws."""
    logits, total = torch.tensor([[0.0, math.log(2e-5)]]).expand(100_000, -1), 0
    for seed in range(20):
        total += int(draw(logits, SamplingParams(1, seed=seed)).sum())
    assert abs(total - 40) < 4 * math.sqrt(40)


def slow_kept(logits: Tensor, top_k: int, top_p: float) -> list[set[int]]:
    """Which tokens a filter keeps, by sorting Python numbers."""
    kept = []
    for row in logits.double().tolist():
        order = sorted(range(len(row)), key=lambda token: -row[token])
        if top_k:
            order = order[:top_k]
        weights = [math.exp(row[token]) for token in order]
        before, least = 0.0, row[order[0]]
        for token, weight in zip(order, weights, strict=True):
            if top_p < 1.0 and before / sum(weights) >= top_p:
                break
            before, least = before + weight, row[token]
        kept.append({token for token in range(len(row)) if row[token] >= least})
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (0, 0.5), (0, 0.9), (12, 0.7), (0, 1e-6), (40, 1.0), (99, 0.8)]
)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_filters_keep_exactly_the_right_tokens(top_k: int, top_p: float, shards: int) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 40, generator=generator) * 2
    logits[:3] = logits[:3].mul(2).round()  # many equal logits
    sampling = SamplingParams(1, top_k=top_k, top_p=top_p, temperature=1.3)
    scaled = logits / 1.3
    told = [module.candidates(part, 40 // shards, sampling) for _, part in cut(scaled, shards)]
    least = module.cutoff(torch.cat(told, dim=1), sampling)
    expected = slow_kept(scaled, top_k, top_p)
    assert [set(row.nonzero().flatten().tolist()) for row in scaled >= least] == expected


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.6), (6, 0.8)])
def test_filtered_frequencies_are_the_renormalised_ones(top_k: int, top_p: float) -> None:
    logits = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 1.5
    kept = sorted(slow_kept(logits[None], top_k, top_p)[0])
    drawn = draw(logits.expand(30_000, -1), SamplingParams(1, top_k=top_k, top_p=top_p, seed=5))
    counts = torch.bincount(drawn, minlength=30)
    assert counts.sum() == counts[kept].sum()
    assert chi_square_z(counts[kept], logits[kept].softmax(0)) < 3.5


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(1, seed=9),
        SamplingParams(1, temperature=0.0),
        SamplingParams(1, top_k=7, temperature=0.8),
        SamplingParams(1, top_p=0.8),
        SamplingParams(1, top_k=20, top_p=0.7),
    ],
    ids=["plain", "greedy", "top-k", "top-p", "both"],
)
@pytest.mark.parametrize("vocab_size", [131, 60])  # 60 leaves shards that are nothing but padding
def test_cuts_of_the_vocabulary_do_not_change_the_draw(sampling: SamplingParams, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(200, 144, generator=generator) * 3).round(decimals=1)  # with ties
    logits[:, vocab_size:] = 100.0  # padding would win if it were let in
    rows = {"sample_index": torch.arange(200) * 3, "position": torch.arange(200) % 17}
    whole = sample_tokens(logits, vocab_start=0, vocab_size=vocab_size, sampling=sampling, **rows)
    assert whole.max() < vocab_size
    for shards in (1, 2, 4, 8):
        assert torch.equal(draw_in_shards(logits, vocab_size, shards, sampling, **rows), whole)


def test_rows_do_not_see_each_other() -> None:
    logits = torch.randn(50, 33, generator=torch.Generator().manual_seed(5))
    for sampling in (SamplingParams(1, seed=2), SamplingParams(1, top_p=0.9, top_k=10)):
        together = draw(logits, sampling)
        alone = torch.cat([draw(logits[row : row + 1], sampling, first_sample=row) for row in range(50)])
        assert torch.equal(together, alone)


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [-1.0, -2.0, -1.0, -5.0], [0.0, 0.0, 0.0, 0.0]])
    greedy = SamplingParams(1, temperature=0.0)
    assert draw(logits, greedy).tolist() == [1, 0, 0]
    assert draw_in_shards(logits, 4, 2, greedy, sample_index=torch.arange(3), position=torch.arange(3)).tolist() == [
        1,
        0,
        0,
    ]
    assert draw(logits, SamplingParams(1, temperature=0.0, seed=77)).tolist() == [1, 0, 0]


def test_a_small_temperature_approaches_greedy() -> None:
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(6))
    assert torch.equal(draw(logits, SamplingParams(1, temperature=1e-5)), logits.argmax(1))


def test_nan_logits_give_no_token() -> None:
    logits = torch.randn(3, 8)
    logits[1, 5] = torch.nan
    for sampling in (SamplingParams(1), SamplingParams(1, temperature=0.0), SamplingParams(1, top_k=3)):
        drawn = draw(logits, sampling)
        assert drawn[1] == INVALID_TOKEN
        assert drawn[0] >= 0 and drawn[2] >= 0


def test_half_precision_logits_are_drawn_from_in_full() -> None:
    logits = torch.randn(100, 64, generator=torch.Generator().manual_seed(7)).bfloat16()
    assert torch.equal(draw(logits, SamplingParams(1)), draw(logits.float(), SamplingParams(1)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"stop": ("",)}, "stop="),
        ({"stop": "end"}, "stop='end'"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**{"max_new_tokens": 4, **values})
