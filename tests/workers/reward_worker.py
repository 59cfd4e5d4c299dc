"""What the ranks of tests/test_reward.py do: learn from pairs or scores under each cut of the same world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.reward import pair_loss, score_loss
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.models.reward import RewardModel
from nemo_rlhf.parallel import checkpoint, state
from tests.workers.parallel_worker import OPTIM, SEED, TOTAL_STEPS, VOCAB, Cut, config_of


def make_pairs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [2P, S] of five pairs of uneven texts, a mask of last tokens, lengths, and margins by row."""
    generator = torch.Generator().manual_seed(9)
    lengths = torch.tensor([20, 7, 4, 13, 9, 9, 3, 18, 12, 5])
    tokens = torch.randint(0, VOCAB, (10, 20), generator=generator)
    tokens = torch.where(torch.arange(20) < lengths[:, None], tokens, 0)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[torch.arange(10), lengths - 1] = True
    margins = torch.rand(5, generator=generator).repeat_interleave(2)[:, None].expand(10, 20)
    return tokens, mask, lengths, margins


def make_targets() -> Tensor:
    """Scores [10] that somebody gave the same texts."""
    return torch.randn(10, generator=torch.Generator().manual_seed(10)) * 2 + 0.5


def train(cut: Cut, directory: Path, target: Path, micro_batch: int = 2, kind: str = "pairs") -> dict[str, Any]:
    """Three steps; scores before and after them; the trained model is left in ``target``."""
    config = config_of(cut, directory, micro_batch=micro_batch)
    model = open_role(RewardModel, config, str(directory), "32", SEED)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    tokens, mask, lengths, margins = make_pairs()
    together, loss, targets = 2, pair_loss(5), margins
    if kind == "scores":
        together, loss, targets = 1, score_loss(10), make_targets()[:, None].expand(tokens.shape)

    def scores() -> Tensor:
        return model.scores(model.cut(tokens, mask, lengths, range(10)), tokens)[mask]

    before, logged = scores(), []
    for _ in range(3):
        rows = range(0, 10, together)
        microbatches = model.cut(tokens, mask, lengths, rows, {"targets": targets}, together=together)
        sums, norm = model.learn(microbatches, loss)
        logged.append({**sums, "norm": norm})
    checkpoint.on_rank_zero(lambda: target.mkdir(parents=True))
    checkpoint.save_model(model.gpt, target)
    return {"before": before, "steps": logged, "after": scores()}


def run(payload: dict[str, Any]) -> dict[str, Any]:
    results = {}
    for name, (cut, arguments) in payload.items():
        state.initialize(cut.tp, cut.pp, SEED)
        results[name] = train(cut, **arguments)
    return results
