"""The parts of the parallel room against slow references: log-probabilities, attention, the cache, memory, files."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.load import load_weights
from nemo_rlhf.convert.source import RandomSource
from nemo_rlhf.models.policy import token_logprobs
from nemo_rlhf.parallel import attention, schedule, state
from nemo_rlhf.parallel import logprobs as logprobs_module
from nemo_rlhf.parallel.attention import SDPACoreAttention
from nemo_rlhf.parallel.elementwise import GeGLU, SwiGLU, rms_norm
from nemo_rlhf.parallel.gpt import GPT, _at, _before, build_gpt
from nemo_rlhf.parallel.kv_cache import KVCache
from nemo_rlhf.parallel.logprobs import vocab_parallel_logprobs
from nemo_rlhf.parallel.offload import Offload, Swap
from nemo_rlhf.parallel.packing import packed_texts
from nemo_rlhf.parallel.settings import transformer_config
from nemo_rlhf.parallel.short_attention import short_attention
from tests.spawn import run_distributed
from tests.workers import parallel_worker as worker
from tests.workers.parallel_worker import TEMPERATURE, Cut, Job

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=131,
    max_position_embeddings=64,
    layernorm_epsilon=1e-5,
    rope={"rope_type": "default", "rope_theta": 10000.0},
    tie_embeddings=False,
    initializer_range=0.1,
)
CHUNKS = (1, 7, 29)
VOCABULARIES = {"padded": 131, "a rank of padding only": 6, "whole": 128}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> None:
    state.set_environment_for_one_process()
    state.initialize(1, 1, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    jobs = []
    for vocab, chunk, dtype in product(VOCABULARIES.values(), CHUNKS, (torch.float32, torch.bfloat16)):
        arguments = {"vocab_size": vocab, "chunk": chunk, "dtype": dtype}
        jobs.append(Job(f"{vocab}/{chunk}/{dtype}", Cut(tp=2), "split_logprobs", arguments))
    jobs.append(Job("writes", Cut(), "failing_writes", {"directory": tmp_path_factory.mktemp("writes")}))
    return run_distributed("tests.workers.parallel_worker:run_jobs", 2, jobs, timeout_s=120)


# ---- log-probabilities


def slow_logprobs(vocab_size: int, dtype: torch.dtype, grads: Tensor | None = None) -> dict[str, Tensor]:
    """The whole matrix of logits, in fp64, from the same numbers."""
    hidden, weight, targets, given = worker.logprob_inputs(vocab_size, dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_probs = (hidden @ weight[:vocab_size].t() / TEMPERATURE).log_softmax(-1)
    logprobs = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    grads = given if grads is None else grads
    (logprobs * grads[0] + entropy * grads[1]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "hidden": hidden.grad, "weight": weight.grad}


def assert_matches_slow(result: dict[str, Tensor], vocab_size: int, dtype: torch.dtype) -> None:
    expected = slow_logprobs(vocab_size, dtype)
    assert result["logprobs"].dtype == result["entropy"].dtype == torch.float32
    assert result["hidden"].dtype == result["weight"].dtype == dtype
    # in bf16 a logit of size up to 32 is rounded to 1/16, a gradient of size up to 16 to 1/32: two of each may add up
    values, gradients = ((1e-5, 2e-5), (1e-5, 2e-5)) if dtype == torch.float32 else ((0.0, 0.15), (0.05, 0.25))
    for name, value in expected.items():
        rtol, atol = gradients if name in ("hidden", "weight") else values
        torch.testing.assert_close(
            result[name].double(), value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not result["weight"][vocab_size:].any(), "rows of the padding have a gradient"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("vocab_size", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_logprobs_are_those_of_a_log_softmax(vocab_size: int, chunk: int, dtype: torch.dtype) -> None:
    state.initialize(1, 1, 1)
    assert_matches_slow(worker.split_logprobs(Cut(), vocab_size, chunk, dtype), vocab_size, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("vocab_size", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_logprobs_over_two_ranks(two: list[dict[str, Any]], vocab_size: int, chunk: int, dtype: torch.dtype) -> None:
    for rank in two:
        assert_matches_slow(rank[f"{vocab_size}/{chunk}/{dtype}"], vocab_size, dtype)


@pytest.mark.parametrize("which", [0, 1])
def test_either_gradient_may_be_missing(which: int) -> None:
    hidden, weight, targets, grads = worker.logprob_inputs(131, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = vocab_parallel_logprobs(hidden, weight, targets, vocab_size=131, temperature=TEMPERATURE, chunk_tokens=7)
    (outputs[which] * grads[which]).sum().backward()
    only = torch.zeros_like(grads)
    only[which] = grads[which]
    expected = slow_logprobs(131, torch.float32, only)
    torch.testing.assert_close(hidden.grad.double(), expected["hidden"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(weight.grad.double(), expected["weight"], rtol=1e-5, atol=2e-5)


def test_extreme_logits_stay_finite() -> None:
    """Logits of +-1000: without the maximum taken out, every exponential overflows."""
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    logprobs, entropy = vocab_parallel_logprobs(hidden, weight, torch.tensor([0, 0]), vocab_size=3)
    assert logprobs.tolist() == [0.0, -2000.0] and entropy.tolist() == [0.0, 0.0]
    (logprobs + entropy).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operation gives back, views included."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize("chunk_tokens", [16, None])
def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch, chunk_tokens: int | None) -> None:
    tokens, vocabulary, width, chunk = 300, 1000, 8, 16
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS_CPU", chunk * vocabulary)  # what None falls back to
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS_CUDA", chunk * vocabulary)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with LargestTensor() as largest:
        logprobs, entropy = vocab_parallel_logprobs(
            hidden, weight, targets, vocab_size=vocabulary - 3, chunk_tokens=chunk_tokens
        )
        (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.any()
    assert chunk * (vocabulary - 3) <= largest.numel <= chunk * vocabulary, largest.numel
    with LargestTensor() as whole:
        (hidden @ weight.t()).log_softmax(-1).sum().backward()
    assert whole.numel == tokens * vocabulary, "the measurement does not see a full matrix"


# ---- attention


def slow_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    """Attention written out: scores of every pair, softmax, weighted sum. [S, B, heads, C] over [T, B, groups, C];
    ``hidden`` [B, S, T] is True where a query does not see a key."""
    query, key, value = query.double(), key.double(), value.double()
    share = query.size(2) // key.size(2)
    out = torch.zeros_like(query)
    for b in range(query.size(1)):
        for head in range(query.size(2)):
            scores = query[:, b, head] @ key[:, b, head // share].t() / query.size(3) ** 0.5
            weights = scores.masked_fill(hidden[b], float("-inf")).softmax(-1)
            out[:, b, head] = weights @ value[:, b, head // share]
    return out.flatten(2)


def projections(queries: int, keys: int, batch: int, groups: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((queries, batch, 4, 16), (keys, batch, groups, 16), (keys, batch, groups, 16))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def core_attention() -> SDPACoreAttention:
    config = transformer_config(
        ARCHITECTURE, dtype=torch.float32, sequence_parallel=False, recompute=None, layer_spec="local"
    )
    return SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


def assert_same_attention(inputs: list[Tensor], fast: Tensor, slow: Tensor) -> None:
    """Values, and gradients of a random direction."""
    torch.testing.assert_close(fast.double(), slow, rtol=1e-5, atol=1e-5)
    direction = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((fast * direction).sum(), inputs)
    theirs = torch.autograd.grad((slow * direction.double()).sum(), inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def causal(length: int, batch: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1).expand(batch, -1, -1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 13])
def test_causal_attention(length: int, groups: int) -> None:
    inputs = projections(length, length, 3, groups)
    fast = core_attention()(*inputs, None, AttnMaskType.causal)
    assert_same_attention(inputs, fast, slow_attention(*inputs, causal(length, 3)))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("first", [0, 5, 12])
def test_short_sequences_from_projection_to_projection(first: int, groups: int) -> None:
    length, batch, channels = 13, 3, 16
    mixed = torch.randn(length, batch, groups, 4 // groups + 2, channels, requires_grad=True)
    angles = torch.outer(torch.arange(length), torch.rand(channels // 2)).view(length, 1, 1, 1, -1)
    fast = short_attention(mixed, angles.cos(), angles.sin(), 0.25, first)

    def turned(x: Tensor) -> Tensor:
        halves = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones(()).double(), angles.double())
        return torch.cat([halves.real, halves.imag], dim=-1).flatten(2, 3)

    query, key, value = turned(mixed[..., :-2, :]), turned(mixed[..., -2:-1, :]), mixed[..., -1, :]
    slow = slow_attention(query, key, value, causal(length, batch))[first:]
    assert fast.shape == (length - first, batch, 64)
    assert_same_attention([mixed], fast, slow)


@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask, AttnMaskType.arbitrary])
def test_a_boolean_mask_alone_decides(mask_type: AttnMaskType) -> None:
    inputs = projections(9, 9, 2)
    hidden = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    hidden[:, torch.arange(9), torch.arange(9)] = False  # every query sees something
    fast = core_attention()(*inputs, hidden[:, None], mask_type)
    assert_same_attention(inputs, fast, slow_attention(*inputs, hidden))


def test_padded_keys_are_hidden_from_every_query() -> None:
    inputs = projections(6, 6, 3)
    padding = torch.arange(6) >= torch.tensor([6, 2, 4])[:, None]
    fast = core_attention()(*inputs, padding[:, None, None, :], AttnMaskType.padding)
    assert_same_attention(inputs, fast, slow_attention(*inputs, padding[:, None].expand(-1, 6, -1)))


@pytest.mark.parametrize("form", ["boolean", "added"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_query_over_keys_of_many_lengths(groups: int, form: str) -> None:
    """The form of a decoding step: the queries of a group are computed together."""
    inputs = projections(1, 11, 4, groups)
    hidden = torch.arange(11) > torch.tensor([10, 0, 4, 7])[:, None]
    mask = hidden[:, None, None, :]
    if form == "added":
        mask = torch.zeros(mask.shape).masked_fill(mask, float("-inf"))
    fast = core_attention()(*inputs, mask, AttnMaskType.no_mask)
    assert fast.shape == (1, 4, 64)
    assert_same_attention(inputs, fast, slow_attention(*inputs, hidden[:, None]))


def test_packed_sequences_attend_within_themselves() -> None:
    """Five texts side by side, one of a single token among them."""
    bounds = [0, 5, 6, 15, 18, 20]
    query, key, value = (x.squeeze(1).detach().requires_grad_() for x in projections(20, 20, 1))
    packing = packed_texts(torch.tensor(bounds))
    fast = core_attention()(query, key, value, None, AttnMaskType.causal, packed_seq_params=packing)
    parts = []
    for start, end in pairwise(bounds):
        rows = [x[start:end, None] for x in (query, key, value)]
        parts.append(slow_attention(*rows, causal(end - start, 1)).squeeze(1))
    assert_same_attention([query, key, value], fast, torch.cat(parts))


# ---- the cache


@pytest.fixture(scope="module")
def model(world_of_one: None) -> GPT:
    model = build_gpt(ARCHITECTURE)
    load_weights(model, RandomSource(ARCHITECTURE, 4), ARCHITECTURE)
    return model.eval()


@torch.no_grad()
def whole_forward(model: GPT, tokens: Tensor) -> Tensor:
    """Hidden states [S, H] of one sequence, without a cache."""
    return model(tokens[None], torch.arange(len(tokens))[None])[:, 0]


class Slots:
    """Sequences whose tokens are known in advance, run through a cache; whatever it computes is kept by sequence."""

    def __init__(self, model: GPT, tokens: Tensor, num_slots: int) -> None:
        self.model, self.tokens = model, tokens
        self.cache = KVCache(num_slots, 40)
        self.held: list[int] = []  # sequence in each slot
        self.done = [0] * len(tokens)  # tokens seen of each sequence
        self.hidden: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def prefill(self, slot: int, sequences: list[int], lengths: list[int]) -> None:
        self.held[slot : slot + len(sequences)] = sequences
        width = max(lengths)
        rows = torch.zeros(len(sequences), width, dtype=torch.long)
        for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            rows[i, :length] = self.tokens[sequence, :length]
        self.cache.prefill(slot, len(sequences))
        out = self.model(rows, torch.arange(width).expand_as(rows), inference_context=self.cache)
        for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            self.done[sequence] = length
            self.hidden |= {(sequence, t): out[t, i] for t in range(length)}

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            at = [self.done[sequence] for sequence in self.held]
            rows = torch.stack([self.tokens[s, t] for s, t in zip(self.held, at, strict=True)])[:, None]
            positions = torch.tensor(at)
            self.cache.decode(positions, max(at))
            out = self.model(rows, positions[:, None], inference_context=self.cache)
            for i, (sequence, t) in enumerate(zip(self.held, at, strict=True)):
                self.hidden[sequence, t] = out[0, i]
                self.done[sequence] = t + 1


def test_a_cache_gives_what_a_whole_forward_gives(model: GPT) -> None:
    """Prompts of different lengths, decoded side by side; sequences that end give their slots to later ones."""
    tokens = torch.randint(0, 131, (7, 40), generator=torch.Generator().manual_seed(8))
    slots = Slots(model, tokens, 5)
    slots.prefill(0, [0, 1], [3, 9])
    slots.prefill(2, [2, 3, 4], [1, 14, 6])
    slots.decode(5)
    # sequences 1 and 2 end: the last slots close the gaps, in another order than they came
    slots.cache.move([(4, 1), (3, 2)])
    slots.held = [0, 4, 3]
    slots.decode(3)
    slots.prefill(3, [5, 6], [11, 2])
    slots.decode(9)
    slots.cache.move([(4, 0)])
    slots.held = [6, 4, 3, 5]
    slots.decode(4)
    assert slots.done == [20, 14, 6, 35, 27, 24, 15]
    for sequence, length in enumerate(slots.done):
        expected = whole_forward(model, tokens[sequence, :length])
        got = torch.stack([slots.hidden[sequence, t] for t in range(length)])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_a_slot_forgets_who_held_it(model: GPT) -> None:
    """A short sequence after a long one sees none of it."""
    tokens = torch.randint(0, 131, (2, 40), generator=torch.Generator().manual_seed(9))
    slots = Slots(model, tokens, 1)
    slots.prefill(0, [0], [30])
    slots.decode(5)
    slots.prefill(0, [1], [2])
    slots.decode(6)
    got = torch.stack([slots.hidden[1, t] for t in range(8)])
    torch.testing.assert_close(got, whole_forward(model, tokens[1, :8]), rtol=1e-4, atol=2e-5)


# ---- what the last layer leaves out


def in_fp64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def test_rms_norm_and_its_gradients() -> None:
    torch.manual_seed(3)
    wide = torch.randn(5, 3, 4, 48)
    for x in (wide[..., :16], torch.randn(7, 16) * 1e-4, torch.zeros(2, 16)):  # a part of each row, as of queries
        x, weight, grad = x.detach().requires_grad_(), torch.randn(16).requires_grad_(), torch.randn(x.shape)
        for eps in (1e-6, 1e-5):
            got, expected = rms_norm(x, weight, eps), in_fp64(x, weight, eps)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
            grads = torch.autograd.grad(got, (x, weight), grad)
            slow = torch.autograd.grad(expected, (x, weight), grad.double())
            for found, wanted in zip(grads, slow, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("unit", [SwiGLU, GeGLU])
def test_gated_units_write_their_gradient_over_their_input(unit: type[torch.nn.Module]) -> None:
    """Once: whoever needs the input after that is told, instead of given something else."""
    x, grad = torch.randn(5, 3, 32).requires_grad_(), torch.randn(5, 3, 16)
    gate, up = x.detach().double().chunk(2, dim=-1)
    gate, up = gate.requires_grad_(), up.requires_grad_()
    activated = gate * gate.sigmoid()
    if unit is GeGLU:
        activated = gate * (1 + ((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)).tanh()) / 2
    made = x * 1.0  # as by a projection, which does not need it either
    got, expected = unit(None)(made), activated * up
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(got, x, grad, retain_graph=True)
    wanted = torch.cat(torch.autograd.grad(expected, (gate, up), grad.double()), dim=-1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(got, x, grad)


LAST_LAYERS = {
    "llama": ARCHITECTURE,
    "window": replace(ARCHITECTURE, sliding_window=4, windowed_layers=(0, 1)),
    "learned positions": replace(
        ARCHITECTURE, position_embedding="learned", rope=None, normalization="layernorm", num_query_groups=4
    ),
}


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("kind", LAST_LAYERS)
def test_leaving_out_what_nobody_reads_changes_nothing(kind: str, recompute: Any) -> None:
    torch.manual_seed(4)
    model = build_gpt(LAST_LAYERS[kind], recompute=recompute)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    tokens = torch.randint(0, 131, (3, 12))
    positions = torch.arange(12).expand(3, 12)
    results = []
    for first in (0, 7, 11):
        model.zero_grad()
        hidden = model(tokens, positions, first_needed=first)
        assert hidden.shape == (12 - first, 3, 64)
        hidden[7 - first if first <= 7 else 0 :].square().sum().backward()
        results.append((hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (whole, expected), (last, found), (one, _) = results
    torch.testing.assert_close(last, whole[7:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one, whole[11:], rtol=1e-5, atol=1e-5)
    assert len(found) == len(expected) > 10
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", LAST_LAYERS)
def test_long_sequences_go_another_way_to_the_same_result(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    model = build_gpt(LAST_LAYERS[kind])
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    tokens, positions = torch.randint(0, 131, (3, 12)), torch.arange(12).expand(3, 12)
    calls: list[int] = []
    monkeypatch.setattr(attention, "short_attention", lambda *a, **k: calls.append(1) or short_attention(*a, **k))
    results = []
    for longest in (12, 11):
        monkeypatch.setattr(attention, "LONGEST", longest)
        model.zero_grad()
        hidden = model(tokens, positions, first_needed=4)
        hidden.square().sum().backward()
        results.append((hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    # of two layers those with a rotation, and no window that is shorter than the text
    assert len(calls) == {"llama": 2, "window": 0, "learned positions": 0}[kind]
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)


def test_the_last_place_is_run_only_where_a_head_reads_it(model: GPT) -> None:
    tokens, mask = torch.randint(0, 131, (3, 12)), torch.zeros(3, 12, dtype=torch.bool)
    mask[:, 7:] = True
    whole = model(tokens, torch.arange(12).expand(3, 12))
    for reads, places in (("before", range(6, 11)), ("at", range(7, 12))):
        (microbatch,) = schedule.cut(
            tokens, mask, torch.full((3,), 12), range(3), micro_batch_size=3, limit=12, reads=reads
        )
        hidden = schedule.through(model, microbatch)
        torch.testing.assert_close(hidden, whole[list(places)], rtol=1e-5, atol=1e-5)
        read = _before if reads == "before" else _at
        expected = torch.stack([whole[place, row] for row in range(3) for place in places])
        for states in (hidden, whole):
            torch.testing.assert_close(read(states, tokens, microbatch.selected), expected, rtol=1e-5, atol=1e-5)


def test_hidden_states_that_are_there_are_not_computed_again(model: GPT) -> None:
    """What ``ppo.keep_graph`` stands on: equal results would not tell that a forward pass was saved."""
    tokens, mask = torch.randint(0, 131, (3, 12)), torch.zeros(3, 12, dtype=torch.bool)
    mask[:, 7:] = True
    (microbatch,) = schedule.cut(tokens, mask, torch.full((3,), 12), range(3), micro_batch_size=3, limit=12)
    passes: list[None] = []
    hook = model.register_forward_hook(lambda *_: passes.append(None))
    try:
        kept = replace(microbatch, hidden=schedule.through(model, microbatch))
        assert kept.hidden is not None and kept.hidden.requires_grad and len(passes) == 1
        said = token_logprobs(model, kept.hidden, kept, 1.0)
        assert token_logprobs(model, kept.hidden, replace(kept, said=said), 1.0) is said

        def compute(gpt: GPT, hidden: Tensor, batch: schedule.Microbatch) -> dict[str, Tensor]:
            return {"logprobs": gpt.vocab_logprobs(hidden, batch.tokens, batch.selected)[0]}

        again = schedule.forward(model, [kept], compute, tokens)["logprobs"]
        assert len(passes) == 1
        assert torch.equal(again, schedule.forward(model, [microbatch], compute, tokens)["logprobs"])
        assert len(passes) == 2 and again[mask].min() < 0
    finally:
        hook.remove()


# ---- memory


def views_of_one_buffer() -> tuple[Tensor, list[Tensor]]:
    """As megatron's parameters are: views of one storage, in bf16 beside fp32, NaN payloads and negative zeros too."""
    buffer = torch.randn(100)
    buffer[3], buffer[4] = float("nan"), -0.0
    return buffer, [buffer[:40].view(4, 10), buffer[40:], torch.randn(6, 5).bfloat16(), torch.tensor(3.0)]


def bits(tensors: list[Tensor]) -> list[bytes]:
    # copies: a storage that numpy has seen cannot be resized
    return [t.clone().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


def test_offload_frees_memory_and_brings_back_every_bit() -> None:
    buffer, tensors = views_of_one_buffer()
    stays = torch.randn(7)
    before, pointers = bits([*tensors, stays]), [id(t) for t in tensors]
    offload = Offload([*tensors, stays], keep=[stays[:2]])
    assert not offload.is_out and bits([*tensors, stays]) == before
    for _ in range(2):
        offload.out()
        assert offload.is_out
        assert all(t.untyped_storage().nbytes() == 0 for t in (buffer, *tensors))
        assert stays.untyped_storage().nbytes() == 28
        offload.back()
        assert not offload.is_out
        assert bits([*tensors, stays]) == before and pointers == [id(t) for t in tensors]
        assert tensors[0].untyped_storage().data_ptr() == tensors[1].untyped_storage().data_ptr(), "no longer views"
        tensors[1].add_(1.0)  # what changes between two absences must not be lost
        before = bits([*tensors, stays])


def test_swap_lends_the_first_weights_and_gives_the_own_ones_back() -> None:
    _, tensors = views_of_one_buffer()
    kept = bits(tensors)
    swap = Swap(tensors)
    for _ in range(2):
        for tensor in tensors:
            tensor.add_(1.0)
        own = bits(tensors)
        assert own != kept
        with swap.applied():
            assert bits(tensors) == kept
            tensors[1].mul_(2.0)  # what happens to the lent ones is forgotten
        assert bits(tensors) == own
    with pytest.raises(KeyError), swap.applied():
        raise KeyError
    assert bits(tensors) == own, "a failure inside must not leave the lent weights"


# ---- files


def test_a_failed_write_leaves_what_was_there(two: list[dict[str, Any]]) -> None:
    for rank in two:
        result = rank["writes"]
        assert len(result["messages"]) == 4
        for name, said in result["messages"].items():
            reason = "No space left on device" if name.startswith("OSError") else "the writer died"
            assert "could not be written" in said and reason in said, f"{name}: {said}"
            assert result["left"][name] == (["step"], "old"), name
        assert result["then"] == (["step"], "new")


def test_paths_are_one_rank_s_business(tmp_path: Path) -> None:
    """In a world of one, too, a checkpoint appears under its name only when it is whole."""
    from nemo_rlhf.parallel import checkpoint

    seen: list[list[str]] = []

    def write(partial: Path) -> None:
        (partial / "a").write_text("1")
        seen.append(sorted(p.name for p in tmp_path.iterdir()))

    checkpoint.write_atomically(tmp_path / "step", write)
    assert seen == [["step.partial"]] and sorted(p.name for p in tmp_path.iterdir()) == ["step"]
    checkpoint.verify(tmp_path / "step")
