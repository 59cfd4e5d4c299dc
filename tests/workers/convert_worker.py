"""What the ranks of tests/test_convert.py do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_rlhf.convert.load import RandomSource, load_weights, open_source, read_architecture
from nemo_rlhf.convert.source import normal
from nemo_rlhf.parallel import checkpoint, state
from nemo_rlhf.parallel.gpt import GPT, build_gpt


def load(path: str, seed: int | None = None, dtype: torch.dtype = torch.float32) -> GPT:
    architecture = read_architecture(path)
    model = build_gpt(architecture, dtype=dtype).eval()
    source = open_source(path) if seed is None else RandomSource(architecture, seed)
    load_weights(model, source, architecture)
    return model


@torch.no_grad()
def hidden_states(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Hidden states [S, B, H] of this stage, after those before it."""
    batch, length = tokens.shape
    previous = (state.pp_rank() - 1) * state.tp_size() + state.tp_rank()
    if not state.is_first_stage():
        received = torch.empty(length, batch, model.config.hidden_size)
        dist.recv(received, previous)
        model.set_input_tensor(received)
    hidden = model(tokens, torch.arange(length).expand(batch, -1))
    if not state.is_last_stage():
        dist.send(hidden.contiguous(), previous + 2 * state.tp_size())
    return hidden


@torch.no_grad()
def logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits [B, S, vocabulary] on the last stage, None before it."""
    hidden = hidden_states(model, tokens)
    if not state.is_last_stage():
        return None
    part = model.output_logits(hidden.reshape(-1, hidden.size(-1)))
    parts = [torch.empty_like(part) for _ in range(state.tp_size())]
    dist.all_gather(parts, part.contiguous(), group=state.tp_group())
    whole = torch.cat(parts, dim=-1).view(*hidden.shape[:2], -1).transpose(0, 1)
    assert (whole[..., model.architecture.vocab_size :] == 0).all(), "rows of the padding are not zero"
    return whole[..., : model.architecture.vocab_size]


@torch.no_grad()
def values(path: str, tokens: torch.Tensor, seed: int) -> torch.Tensor | None:
    """Values [B, S] of a critic started from the language model at ``path``; None before the last stage."""
    architecture = read_architecture(path)
    model = build_gpt(architecture, role="critic").eval()
    load_weights(model, open_source(path), architecture)
    if state.is_last_stage():  # a head that a trained critic could have; a new one is zero
        with torch.no_grad():
            model.value_head.weight.copy_(normal("value_head.weight", seed, tuple(model.value_head.weight.shape)))
    hidden = hidden_states(model, tokens)
    return model.value_head(hidden).T if state.is_last_stage() else None


def run(payload: dict[str, Any]) -> dict[str, Any]:
    state.initialize(payload["tp"], payload["pp"], seed=1)
    tokens = payload["tokens"]
    results: dict[str, Any] = {}
    for name, path in payload["directories"].items():
        model = load(path)
        results[name] = logits(model, tokens)
        results[f"{name}/random"] = logits(load(path, seed=5), tokens)
        results[f"{name}/values"] = values(path, tokens, seed=6)
        if payload["save"] is not None:
            target = Path(payload["save"]) / name
            if dist.get_rank() == 0:
                target.mkdir(parents=True)
            dist.barrier()
            checkpoint.save_model(model, target)
    return results
