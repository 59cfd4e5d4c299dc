"""What the ranks of tests/test_experts.py do; the test's own process does the same as a world of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from nemo_rlhf.config.optim import OptimConfig, SchedConfig
from nemo_rlhf.convert.load import load_weights, open_source, read_architecture
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import checkpoint, schedule, state
from nemo_rlhf.parallel.gpt import GPT, build_gpt
from nemo_rlhf.parallel.optimizer import ModelOptimizer
from nemo_rlhf.types import Prompt, Request

OPTIM = OptimConfig(
    lr=1e-2, betas=[0.9, 0.95], eps=1e-3, weight_decay=0.1, clip_grad=0.25, sched=SchedConfig(name="constant")
)
NEW_TOKENS = 20


@dataclass(frozen=True)
class Cut:
    """TP x PP x EP of the world; sequence parallelism is on where TP is, as training needs it."""

    tp: int = 1
    pp: int = 1
    ep: int = 1


@dataclass(frozen=True)
class Job:
    """``action`` (a function of this module) on the model at ``directory`` under ``cut``."""

    name: str
    cut: Cut
    action: str
    directory: Path
    arguments: dict[str, Any] = field(default_factory=dict)


def run(jobs: Sequence[Job]) -> dict[str, Any]:
    results = {}
    for job in jobs:
        state.initialize(job.cut.tp, job.cut.pp, seed=1, expert_parallel=job.cut.ep)
        results[job.name] = globals()[job.action](load(job.directory, job.cut.tp > 1), **job.arguments)
    return results


def load(directory: Path, sequence_parallel: bool) -> GPT:
    architecture = read_architecture(directory)
    model = build_gpt(architecture, sequence_parallel=sequence_parallel)
    load_weights(model, open_source(directory), architecture)
    return model


@torch.no_grad()
def logits(model: GPT, tokens: Tensor) -> Tensor | None:
    """Logits [B, S, vocabulary] on the last stage, None before it."""
    model.eval()
    batch, length = tokens.shape
    part_length = length // state.tp_size() if model.config.sequence_parallel else length
    if not state.is_first_stage():
        received = torch.empty(part_length, batch, model.config.hidden_size)
        dist.recv(received, group=state.pp_group(), group_src=state.pp_rank() - 1)
        model.set_input_tensor(received)
    hidden = model(tokens, torch.arange(length).expand(batch, -1))
    if not state.is_last_stage():
        dist.send(hidden.contiguous(), group=state.pp_group(), group_dst=state.pp_rank() + 1)
        return None
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=state.tp_group())
    part = model.output_logits(hidden.reshape(-1, hidden.size(-1)))
    parts = [torch.empty_like(part) for _ in range(state.tp_size())]
    dist.all_gather(parts, part.contiguous(), group=state.tp_group())
    whole = torch.cat(parts, dim=-1).view(length, batch, -1).transpose(0, 1)
    return whole[..., : model.architecture.vocab_size]


def save(model: GPT, target: Path) -> None:
    _make(target)
    checkpoint.save_model(model, target)


def _make(target: Path) -> None:
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()


def _microbatches(model: GPT, tokens: Tensor, rows: Sequence[int], micro_batch_size: int) -> list[schedule.Microbatch]:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    return schedule.cut(
        tokens,
        mask,
        torch.full((tokens.size(0),), tokens.size(1)),
        rows,
        micro_batch_size=micro_batch_size,
        limit=tokens.size(1),
        multiple_of=state.tp_size() if model.config.sequence_parallel else 1,
    )


def learn(
    model: GPT,
    batches: Sequence[Tensor],
    save_to: Path | None = None,
    weights_to: Path | None = None,
    load_from: Path | None = None,
) -> dict[str, Any]:
    """One optimizer step on each batch [B, S] of a mean cross-entropy; then the logits of the first.

    ``save_to``, ``weights_to``: keep optimizer and weights there when done; ``load_from``: begin with that optimizer.
    """
    optimizer = ModelOptimizer(model, OPTIM, total_steps=10)
    if load_from is not None:
        wanted = optimizer.sharded_state_dict(loading=True)
        optimizer.load_state_dict(checkpoint.load_tensors(wanted, load_from))
    losses, norms = [], []
    for tokens in batches:
        num_learned = tokens.size(0) * (tokens.size(1) - 1)

        def loss(gpt: GPT, hidden: Tensor, batch: schedule.Microbatch, n: int = num_learned) -> Any:
            logprobs, _ = gpt.vocab_logprobs(hidden, batch.tokens, batch.selected)
            value = -logprobs.sum() / n
            return value, {"loss": value.detach().clone()}

        optimizer.zero_grad()
        rows = list(range(tokens.size(0)))[state.dp_rank() :: state.dp_size()]
        sums = schedule.forward_backward(optimizer.ddp, _microbatches(model, tokens, rows, 1), loss)
        losses.append(sums["loss"])
        norms.append(optimizer.step())
    if save_to is not None and weights_to is not None:
        save(model, weights_to)
        _make(save_to)
        checkpoint.save_tensors(optimizer.sharded_state_dict(loading=False), save_to)
    return {"losses": losses, "norms": norms, "logits": logits(model, batches[0])}


@torch.no_grad()
def score(model: GPT, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, S], the rows unevenly over the data-parallel ranks: the first has none."""
    others = max(state.dp_size() - 1, 1)
    mine = state.dp_rank() - 1 if state.dp_size() > 1 else 0
    rows = list(range(tokens.size(0)))[mine::others] if mine >= 0 else []

    def compute(gpt: GPT, hidden: Tensor, batch: schedule.Microbatch) -> dict[str, Tensor]:
        return {"logprobs": gpt.vocab_logprobs(hidden, batch.tokens, batch.selected)[0]}

    parts = schedule.forward(model, _microbatches(model, tokens, rows, 2), compute, tokens)
    return state.sum_over_data_parallel(parts.get("logprobs", torch.zeros(tokens.shape)))


def generate(model: GPT, prompts: Sequence[Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Greedy continuations by the prompt's number. The last data-parallel rank has none, others different numbers."""
    others = max(state.dp_size() - 1, 1)
    mine = list(range(len(prompts)))[state.dp_rank() :: others] if state.dp_rank() < others else []
    tokenizer = SimpleNamespace(eos_token_id=None, all_special_ids=[], decode=lambda ids, **_: " ".join(map(str, ids)))
    engine = Engine(model, tokenizer, num_slots=2, max_sequence_length=64)
    requests = [Request(Prompt(tuple(prompts[number]), ""), number) for number in mine]
    samples = engine.generate(requests, SamplingParams(NEW_TOKENS, temperature=0.0, ignore_eos=True))
    return {sample.sample_index: sample.response_ids for sample in samples}


def refuse(model: GPT) -> list[str]:
    """What is said of three experts, of none, and of learning under TP without sequence parallelism."""
    sentences = []
    for changes in ({"num_experts": 3}, {"num_experts": 0}):
        try:
            build_gpt(replace(model.architecture, **changes))
        except ValueError as error:
            sentences.append(str(error))
    state.initialize(2, 1, seed=1, expert_parallel=2)
    try:
        ModelOptimizer(build_gpt(model.architecture), OPTIM, total_steps=1)
    except ValueError as error:
        sentences.append(str(error))
    return sentences


def fail_in_one_replica(model: GPT, prompts: Sequence[Sequence[int]]) -> str:
    """The sentence that each replica raises when the first is given a prompt that is too long."""
    tokenizer = SimpleNamespace(eos_token_id=None, all_special_ids=[], decode=lambda ids, **_: "")
    engine = Engine(model, tokenizer, num_slots=2, max_sequence_length=64)
    length = 60 if state.dp_rank() == 0 else 5
    requests = [Request(Prompt((3,) * length, ""), state.dp_rank())]
    try:
        engine.generate(requests, SamplingParams(NEW_TOKENS, temperature=0.0, ignore_eos=True))
    except ValueError as error:
        return str(error)
    return ""
