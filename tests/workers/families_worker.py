"""What the ranks of tests/test_families.py do: logits, gradients and greedy tokens of every family under one cut."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.convert.families import weight_map
from nemo_rlhf.convert.load import _parameters, load_weights, open_source, read_architecture
from nemo_rlhf.convert.mapping import Cut
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import checkpoint, state
from nemo_rlhf.parallel.gpt import GPT, build_gpt
from nemo_rlhf.parallel.optimizer import ModelOptimizer
from nemo_rlhf.parallel.schedule import Microbatch, cut, forward_backward
from nemo_rlhf.types import Prompt, Request
from tests.workers import convert_worker

NEW_TOKENS = 20


def load(path: str, dtype: torch.dtype, sequence_parallel: bool) -> GPT:
    architecture = read_architecture(path)
    model = build_gpt(architecture, dtype=dtype, sequence_parallel=sequence_parallel)
    load_weights(model, open_source(path), architecture)
    return model


@torch.no_grad()
def logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [B, S, vocabulary] on the last stage, also of a sequence-parallel model (which is not cut in stages)."""
    if not model.config.sequence_parallel:
        return convert_worker.logits(model, tokens)
    hidden = model(tokens, torch.arange(tokens.size(1)).expand_as(tokens))
    hidden = gather_from_sequence_parallel_region(hidden, group=state.tp_group())
    part = model.output_logits(hidden.reshape(-1, hidden.size(-1)))
    parts = [torch.empty_like(part) for _ in range(state.tp_size())]
    dist.all_gather(parts, part.contiguous(), group=state.tp_group())
    whole = torch.cat(parts, dim=-1)[:, : model.architecture.vocab_size]
    return whole.view(*hidden.shape[:2], -1).transpose(0, 1)


def gradients(model: GPT, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the mean negative log-likelihood, by Hugging Face name; NaN where this rank holds nothing of a tensor."""
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    count = int(mask.sum())

    def loss(gpt: GPT, hidden: torch.Tensor, batch: Microbatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logprobs, _ = gpt.vocab_logprobs(hidden, batch.tokens, batch.selected)
        value = -logprobs.sum() / count
        return value, {"loss": value.detach()}

    learner = ModelOptimizer(model, OptimConfig(), total_steps=1)
    learner.zero_grad()
    lengths = torch.full((len(tokens),), tokens.size(1))
    multiple_of = state.tp_size() if model.config.sequence_parallel else 1
    microbatches = cut(
        tokens, mask, lengths, range(len(tokens)), micro_batch_size=1, limit=tokens.size(1), multiple_of=multiple_of
    )
    forward_backward(learner.ddp, microbatches, loss)
    for buffer in [*learner.ddp.buffers, *learner.ddp.expert_parallel_buffers]:
        for bucket in buffer.buckets:  # of which every rank of its group has summed a part
            group = buffer.data_parallel_group
            part = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, part, group=group)

    weights = weight_map(model.architecture)
    place = Cut(state.tp_rank(), state.tp_size(), model.padded_vocab_size)
    result: dict[str, torch.Tensor] = {}
    for name, parameter in _parameters(model):
        entry = weights.entries[name]
        for piece in entry.pieces(place):
            values = parameter.main_grad[piece.inside]
            stored = result.setdefault(entry.names[piece.tensor], torch.full(entry.shapes[piece.tensor], torch.nan))
            stored[piece.outside] = values.T if entry.row.layout.transposed else values
    return result


def generate(model: GPT, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    tokenizer: Any = SimpleNamespace(eos_token_id=None, all_special_ids=[], decode=lambda ids, **_: "")
    length = max(map(len, prompts)) + NEW_TOKENS
    engine = Engine(model, tokenizer, num_slots=2, max_sequence_length=length)
    requests = [Request(Prompt(tuple(ids), ""), number) for number, ids in enumerate(prompts)]
    samples = engine.generate(requests, SamplingParams(NEW_TOKENS, temperature=0.0, ignore_eos=True))
    return [sample.response_ids for sample in samples]


def run_cut(payload: dict[str, Any], tp: int, pp: int, sequence_parallel: bool) -> dict[str, Any]:
    state.initialize(tp, pp, seed=1)
    results: dict[str, Any] = {}
    for name, path in payload["directories"].items():
        if tp > 1 and name in payload["one_group"]:
            continue
        model = load(path, torch.float32, sequence_parallel)
        results[f"{name}/logits"] = logits(model, payload["tokens"])
        results[f"{name}/greedy"] = generate(model, payload["prompts"])
        results[f"{name}/gradients"] = gradients(model, payload["tokens"])
        if payload["save"] is not None:
            target = Path(payload["save"]) / name
            if dist.get_rank() == 0:
                target.mkdir(parents=True)
            dist.barrier()
            checkpoint.save_model(model, target)
    return results


def run(payload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each of ``payload["cuts"]``, (tp, pp, sequence_parallel), all of the same world."""
    return {f"{tp}x{pp}": run_cut(payload, tp, pp, parallel) for tp, pp, parallel in payload["cuts"]}


@torch.no_grad()
def beginning(path: str, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into the first layer [B, S, H], and what its first norm makes of it, in bf16."""
    state.initialize(1, 1, seed=1)
    model = load(path, torch.bfloat16, False)
    hidden = model._preprocess(tokens, torch.arange(tokens.size(1)).expand_as(tokens))[0]
    return hidden.transpose(0, 1), model.decoder.layers[0].input_layernorm(hidden).transpose(0, 1)
