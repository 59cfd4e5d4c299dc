"""What the ranks of tests/test_sft.py do: learn from texts in rows of their own, and packed, under each cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.sft import token_loss
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.schedule import forward_backward
from tests.workers.parallel_worker import OPTIM, SEED, TOTAL_STEPS, VOCAB, Cut, open_model, whole_name

LENGTHS = (24, 5, 17, 9, 23, 12, 3, 31)
CAPACITY = 40  # 124 tokens: at least four rows


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and mask [8, 31], lengths [8]; learned stretches begin and end anywhere."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor(LENGTHS)
    places = torch.arange(max(LENGTHS))
    tokens = torch.randint(0, VOCAB, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (places >= torch.tensor([1, 2, 9, 1, 4, 6, 1, 20])[:, None]) & (places < lengths[:, None])
    mask[0, 10:13] = False
    return torch.where(places < lengths[:, None], tokens, 0), mask, lengths


def learn(cut: Cut, directory: Path, packed: bool, recompute: str | None = None) -> dict[str, Any]:
    """Log-probabilities, gradients by whole name (this rank's parts), and two steps."""
    model = open_model("sft", cut, directory, micro_batch=2, recompute=recompute)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    tokens, mask, lengths = texts()
    rows = range(len(lengths))

    def microbatches() -> Any:
        if packed:
            return model.pack(tokens, mask, lengths, rows, CAPACITY)
        return model.cut(tokens, mask, lengths, rows)

    logprobs, _ = model.logprobs(microbatches(), 1.0, tokens)
    result: dict[str, Any] = {"logprobs": logprobs[mask], "rows": len(microbatches()), "steps": []}
    loss = token_loss(int(mask.sum()))
    model.learner.zero_grad()
    forward_backward(model.learner.ddp, microbatches(), loss)
    result["gradients"] = {
        whole_name(model.gpt, name): parameter.main_grad.clone() for name, parameter in model.gpt.named_parameters()
    }
    for _ in range(2):
        sums, norm = model.learn(microbatches(), loss)
        result["steps"].append({"loss": sums["loss"], "norm": norm})
    return result


def run(payload: dict[str, Any]) -> dict[str, Any]:
    results = {}
    for name, (cut, arguments) in payload.items():
        state.initialize(cut.tp, cut.pp, SEED)
        try:
            results[name] = learn(cut, **arguments)
        except Exception as error:
            raise AssertionError(f"job {name} failed") from error
    return results
