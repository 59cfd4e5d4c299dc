"""What the ranks of tests/test_ilql.py do: learn, stop and go on, and generate, under each cut of the same world."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_rlhf.algorithms.ilql import action_loss
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.config.schema import ILQLAlgorithmConfig
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.ilql import ILQLModel
from nemo_rlhf.parallel import checkpoint, state
from nemo_rlhf.parallel.schedule import Loss
from nemo_rlhf.types import Prompt, Request
from tests.workers.parallel_worker import OPTIM, SEED, TOTAL_STEPS, Cut, config_of, make_batch, whole_name

ILQL = ILQLAlgorithmConfig(tau=0.8, gamma=0.95, beta=0.5, alpha=0.3, cql_scale=0.2, awac_scale=0.7)
SYNC_EVERY, STEPS, WIDTH = 2, 4, 40
BETA, CLIP = 4.0, 1.0


def batch_fields(mask: Tensor) -> dict[str, Tensor]:
    rewards = torch.randn(mask.shape, generator=torch.Generator().manual_seed(8))
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return {"rewards": rewards, "is_last": last, "is_cut": torch.zeros_like(mask)}


def loss_of(normalizer: int, detach: bool) -> Loss:
    return action_loss(replace(ILQL, detach_heads=detach), normalizer)


def open_model(
    cut: Cut, source: Path, micro_batch: int = 2, num_q: int = 2, precision: str = "32", value_trunk: bool = False
) -> ILQLModel:
    config = config_of(cut, source, micro_batch=micro_batch)
    sizes = {"ilql_num_q": num_q, "ilql_head_width": WIDTH, "ilql_value_trunk": value_trunk}
    return open_role(ILQLModel, config, str(source), precision, SEED, **sizes)


def learn(model: ILQLModel, steps: range, detach: bool = False) -> list[dict[str, float]]:
    batch = make_batch()
    logged = []
    for step in steps:
        rows = range(len(batch.lengths))
        microbatches = model.cut(batch.tokens, batch.mask, batch.lengths, rows, batch_fields(batch.mask))
        sums, norm = model.learn(microbatches, loss_of(batch.selected, detach))
        if (step + 1) % SYNC_EVERY == 0:
            model.sync_targets(ILQL.alpha)
        logged.append({**{name: value / batch.selected for name, value in sums.items()}, "norm": norm})
    return logged


def validation(model: ILQLModel) -> dict[str, float]:
    batch = make_batch()
    microbatches = model.cut(
        batch.tokens, batch.mask, batch.lengths, range(len(batch.lengths)), batch_fields(batch.mask)
    )
    return {name: value / batch.selected for name, value in model.sums(microbatches, loss_of(1, False)).items()}


def samples(model: ILQLModel, **sampling: Any) -> list[tuple[int, ...]]:
    prompts = [(5, 9, 3), (7,), (100, 2, 2, 50, 8)]
    requests = [Request(Prompt(ids, ""), index) for index, ids in enumerate(prompts)]
    engine = Engine(model.gpt, _Tokenizer(), num_slots=2, max_sequence_length=64)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, **sampling)
    return [sample.response_ids for sample in engine.generate(requests, params)]


class _Tokenizer:
    eos_token_id, all_special_ids = 1, (1,)

    def decode(self, tokens: Any, **_: Any) -> str:
        return ""


def train(
    cut: Cut, directory: Path, shelf: Path, name: str, micro_batch: int = 2, value_trunk: bool = False
) -> dict[str, Any]:
    """Steps without interruption, and with one in their midst; guided samples, and the weights of the targets."""
    model = open_model(cut, directory, micro_batch, value_trunk=value_trunk)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    before = validation(model)
    logged = learn(model, range(2))
    place = shelf / name
    checkpoint.on_rank_zero(lambda: _fresh(place))
    checkpoint.save_model(model.gpt, place)
    model.save_training_state(place / "training")
    logged += learn(model, range(2, STEPS))
    result = {"before": before, "steps": logged, "after": validation(model)}
    resumed = open_model(cut, directory, micro_batch, value_trunk=value_trunk)
    resumed.make_trainable(OPTIM, TOTAL_STEPS)
    checkpoint.load_model(resumed.gpt, place)
    resumed.load_training_state(place / "training")
    result["resumed"] = learn(resumed, range(2, STEPS))
    result["greedy"] = samples(model, temperature=0.0, beta=BETA)
    result["clipped"] = samples(model, temperature=0.0, beta=BETA, adv_clip=0.05)
    result["sampled"] = samples(model, temperature=1.0, top_k=5, beta=1.0)
    return result


def _fresh(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)


def resume(cut: Cut, directory: Path, shelf: Path, name: str) -> list[dict[str, float]]:
    """Go on under this cut from the middle of a run under another; heads and all come from the checkpoint."""
    model = open_model(cut, shelf / name, value_trunk=name.endswith("apart"))
    model.make_trainable(OPTIM, TOTAL_STEPS)
    model.load_training_state(shelf / name / "training")
    return learn(model, range(2, STEPS))


def freeze(cut: Cut, directory: Path, num_layers_unfrozen: int, value_trunk: bool = False) -> dict[str, bool]:
    """Which parameters moved in two steps, by name in the whole model."""
    model = open_model(cut, directory, value_trunk=value_trunk)
    model.freeze(num_layers_unfrozen)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    before = {name: parameter.detach().clone() for name, parameter in model.gpt.named_parameters()}
    learn(model, range(2))
    return {
        whole_name(model.gpt, name): not torch.equal(parameter, before[name])
        for name, parameter in model.gpt.named_parameters()
    }


def detach(cut: Cut, directory: Path) -> dict[str, float]:
    """The trunk's gradient norm with and without the heads' share, where the policy's own loss counts nothing."""
    norms = {}
    for name, detached in (("attached", False), ("detached", True)):
        model = open_model(cut, directory)
        model.make_trainable(OPTIM, TOTAL_STEPS)
        norms[name] = learn(model, range(1), detached)[0]["norm"]
    return norms


def run(payload: dict[str, Any]) -> dict[str, Any]:
    results = {}
    for name, (cut, function, arguments) in payload.items():
        state.initialize(cut.tp, cut.pp, SEED)
        try:
            results[name] = globals()[function](cut, **arguments)
        except Exception as error:
            raise AssertionError(f"job {name} failed") from error
    return results
