"""Padding to few shapes, as on GPUs: how many there are, and that nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.buckets import bucket_length, bucket_rows
from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.convert.load import RandomSource, load_weights
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import shapes, state
from nemo_rlhf.parallel.gpt import GPT, build_gpt
from nemo_rlhf.parallel.optimizer import ModelOptimizer
from nemo_rlhf.parallel.schedule import Microbatch, cut, forward_backward
from nemo_rlhf.types import Prompt, Request

LIMIT, VOCABULARY = 1024, 61
ARCHITECTURE = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=VOCABULARY,
    max_position_embeddings=LIMIT,
    layernorm_epsilon=1e-5,
    rope={"rope_type": "default", "rope_theta": 1e4},
    tie_embeddings=False,
)


def test_buckets_are_few_and_close() -> None:
    for length in range(1, 20_000):
        bucket = bucket_length(length)
        assert length <= bucket < length + max(128, length / 8) and bucket_length(bucket) == bucket
    assert len({bucket_length(length) for length in range(1, 2049)}) == 16
    assert len({bucket_length(length) for length in range(1, 32_769)}) == 16 + 4 * 8
    assert [bucket_rows(rows) for rows in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


@pytest.fixture(scope="module")
def model() -> GPT:
    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    model = build_gpt(ARCHITECTURE)
    load_weights(model, RandomSource(ARCHITECTURE, 4), ARCHITECTURE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)  # so that attention and tokens differ
    model._trims = False  # as on a GPU, where the last layer answers for all places
    return model


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    return lambda on: monkeypatch.setattr(shapes, "pads", lambda: on)


def batch(lengths: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    places, sizes = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    return tokens, (places >= sizes // 3) & (places < sizes) & (places > 0), sizes.squeeze(1)


def microbatches(lengths: list[int], seed: int = 0, **more: Any) -> list[Microbatch]:
    return cut(*batch(lengths, seed), range(len(lengths)), micro_batch_size=4, limit=LIMIT, **more)


def test_steps_of_random_lengths_have_few_shapes(padding: Callable[[bool], None]) -> None:
    """Of 40 steps, 64 rows each, in microbatches of 4."""
    draw = random.Random(0)
    steps = [[draw.randint(2, LIMIT) for _ in range(64)] for _ in range(40)]
    found = {}
    for pads in (False, True):
        padding(pads)
        found[pads] = {
            tuple(part.tokens.shape) for number, step in enumerate(steps) for part in microbatches(step, number)
        }
    assert len(found[False]) > 200
    assert found[True] <= {(4, length) for length in range(128, LIMIT + 1, 128)}


def test_padding_stops_at_the_models_positions_and_at_parallel_parts(padding: Callable[[bool], None]) -> None:
    padding(True)
    tokens, mask, lengths = batch([900, 3], 0)
    given = {"micro_batch_size": 1, "limit": 950}
    assert [part.tokens.size(1) for part in cut(tokens, mask, lengths, [0, 1], **given)] == [950, 128]
    assert [part.tokens.size(1) for part in cut(tokens, mask, lengths, [0, 1], **given, multiple_of=4)] == [952, 128]


def gradients(model: GPT, parts: list[Microbatch]) -> tuple[float, list[torch.Tensor]]:
    def loss(gpt: GPT, hidden: torch.Tensor, part: Microbatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, _ = gpt.vocab_logprobs(hidden, part.tokens, part.selected)
        value = -logprobs.sum() / 100
        return value, {"loss": value.detach()}

    learner = ModelOptimizer(model, OptimConfig(), total_steps=1)
    learner.zero_grad()
    sums = forward_backward(learner.ddp, parts, loss)
    return sums["loss"], [parameter.main_grad.clone() for parameter in model.parameters()]  # type: ignore[attr-defined]


def test_padding_changes_no_loss_and_no_gradient(model: GPT, padding: Callable[[bool], None]) -> None:
    lengths = [5, 130, 64, 17, 33, 200]
    padding(False)
    expected, slow = gradients(model, microbatches(lengths))
    padding(True)
    parts = microbatches(lengths)
    assert {part.tokens.size(1) for part in parts} == {128, 256} and not any(part.drops_last for part in parts)
    found, fast = gradients(model, parts)
    assert found == pytest.approx(expected, rel=1e-6)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


class _Tokenizer:
    eos_token_id = 0
    all_special_ids = (0,)

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


def test_rollouts_of_random_prompts_have_few_shapes_and_the_same_tokens(
    model: GPT, padding: Callable[[bool], None]
) -> None:
    draw = random.Random(1)
    prompts = [tuple(draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, 300))) for _ in range(30)]
    requests = [Request(Prompt(prompt, ""), number) for number, prompt in enumerate(prompts)]
    engine = Engine(model, _Tokenizer(), num_slots=6, max_sequence_length=LIMIT)
    answers, prefills = {}, {}
    for pads in (False, True):
        padding(pads)
        seen = set()

        def note(module: Any, given: tuple[torch.Tensor, ...], seen: set[tuple[int, ...]] = seen) -> None:
            if given[0].size(1) > 1:
                seen.add(tuple(given[0].shape))

        hook = model.register_forward_pre_hook(note)
        samples = engine.generate(requests, SamplingParams(max_new_tokens=9))
        hook.remove()
        answers[pads], prefills[pads] = [sample.response_ids for sample in samples], seen
    assert answers[True] == answers[False] and len({len(answer) for answer in answers[True]}) > 1
    assert len(prefills[False]) > 8
    assert prefills[True] <= {(rows, length) for rows in (1, 2, 4, 8) for length in (128, 256, 320)}
