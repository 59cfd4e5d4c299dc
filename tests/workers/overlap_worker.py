"""What the ranks of tests/test_overlap.py do: learn with and without ``model.overlap_param_gather``, and look at the
weights in every way between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch import Tensor

from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.base import MegatronModel
from nemo_rlhf.models.reference import SwappedReference
from nemo_rlhf.parallel import checkpoint, optimizer, state
from nemo_rlhf.parallel.gathering import Gathering
from nemo_rlhf.parallel.offload import Backup
from nemo_rlhf.types import Prompt, Request
from tests.workers import ilql_worker
from tests.workers import parallel_worker as worker
from tests.workers.parallel_worker import SEED, TOTAL_STEPS, Cut

# clipping is by a norm whose sum depends on which rank has which share, and shares depend on the buckets
OPTIM = replace(worker.OPTIM, clip_grad=0.0)
BUCKET = 3000  # numbers in one: less than a layer has


@dataclass(frozen=True)
class Case:
    """``kind``: of role; ``frozen``: ILQL's, as ``ILQLModel.freeze``; ``experts``: ranks that share a layer's."""

    name: str
    cut: Cut
    kind: str
    directory: Path
    precision: str = "32"
    recompute: str | None = None
    frozen: int | None = None
    experts: int = 1


def run(payload: tuple[list[Case], Path]) -> dict[str, Any]:
    cases, shelf = payload
    results = {}
    for case in cases:
        state.initialize(case.cut.tp, case.cut.pp, SEED, expert_parallel=case.experts)
        try:
            results[case.name] = {
                how: look(case, how == "overlapped", shelf / f"{case.name}-{how}") for how in ("plain", "overlapped")
            }
            if case.kind == "sft":
                results["events"] = {how: events(case, how == "overlapped") for how in ("plain", "overlapped")}
        except Exception as error:
            raise AssertionError(f"case {case.name} failed") from error
    return results


def opened(case: Case) -> Any:
    if case.kind == "ilql":
        return ilql_worker.open_model(case.cut, case.directory, value_trunk=case.frozen is not None)
    more = {"recompute": case.recompute, "expert_model_parallel_size": case.experts}
    return worker.open_model(case.kind, case.cut, case.directory, case.precision, micro_batch=2, **more)


def open_model(case: Case, overlap: bool) -> Any:
    model = opened(case)
    model.config.overlap_param_gather = overlap
    if case.frozen is not None:
        model.freeze(case.frozen)
    with small_buckets():
        model.make_trainable(OPTIM, TOTAL_STEPS)
    return model


@contextmanager
def small_buckets() -> Iterator[None]:
    def config(**given: Any) -> DistributedDataParallelConfig:
        return DistributedDataParallelConfig(**given, bucket_size=BUCKET)

    with patch.object(optimizer, "DistributedDataParallelConfig", config):
        yield


def look(case: Case, overlap: bool, place: Path) -> dict[str, Any]:
    """What is seen of the weights, each time right behind an optimizer step."""
    model = open_model(case, overlap)
    seen: dict[str, Any] = {"logged": []}
    reference = SwappedReference(model) if case.kind == "policy" else None
    engine = None
    if case.kind != "critic":
        engine = Engine(model.gpt, ilql_worker._Tokenizer(), num_slots=2, max_sequence_length=64)

    def learn(steps: int = 1) -> None:
        for _ in range(steps):
            if case.kind == "ilql":
                (logged,) = ilql_worker.learn(model, range(1))
            else:
                (logged,) = worker.learn(model, case.kind, 1)
            logged.pop("norm")
            seen["logged"].append(logged)

    learn(3)
    seen["weights"] = weights(model)
    learn(2)
    seen["evaluation"] = ilql_worker.validation(model) if case.kind == "ilql" else worker.evaluate(model, case.kind)
    learn()
    checkpoint.on_rank_zero(lambda: place.mkdir(parents=True))
    checkpoint.save_model(model.gpt, place)
    seen["saved"] = weights(opened(replace(case, directory=place)))
    learn()
    model.weights_out()
    model.weights_back()
    seen["been away"] = weights(model)
    learn()
    model.weights_out()
    model.weights_back()
    seen["been away again"] = weights(model)
    learn()
    backup = Backup(model.learner.weights())
    learn()
    seen["before restoring"] = weights(model)
    backup.restore()
    seen["restored"] = weights(model)
    if case.kind == "ilql":
        learn()
        model.sync_targets(0.5)
        seen["targets"] = weights(model)
    if reference is not None:
        batch = worker.make_batch()
        learn()
        parts = model.cut(batch.tokens, batch.mask, batch.lengths, range(len(batch.lengths)))
        seen["reference"] = reference.logprobs(parts, 1.0, batch.tokens)
        seen["after the reference"] = weights(model)
    if engine is not None:
        learn()
        seen["sampled"] = sample(engine)
        learn()
        seen["sampled again"] = sample(engine)
    learn()
    seen["last"] = weights(model)
    return seen


def sample(engine: Engine) -> list[tuple[int, ...]]:
    prompts = [(5, 9, 3), (7,), (100, 2, 2, 50, 8)]
    requests = [Request(Prompt(ids, ""), index) for index, ids in enumerate(prompts)]
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    return [one.response_ids for one in engine.generate(requests, sampling)]


def weights(model: MegatronModel) -> dict[str, Tensor]:
    return worker.snapshot(dict(model.gpt.named_parameters()))


def events(case: Case, overlap: bool) -> list[str]:
    """What happens to weights in three steps, in order: "pass", "step", "async" and "sync" gathers, "wait" for one,
    "layer" when one is reached, and "settled" at the end."""
    seen: list[str] = []
    start, before = _ParamAndGradBucketGroup.start_param_sync, Gathering._before_layer
    overlapped, step = Gathering.overlapped, optimizer.ModelOptimizer.step

    def noted_start(group: Any, force_sync: bool = False) -> None:
        under_way = group.param_gather_handle is not None
        seen.append("wait" if under_way else "sync" if force_sync or not overlap else "async")
        start(group, force_sync)

    def noted_before(gathering: Gathering, layer: Any, inputs: Any) -> None:
        seen.append("layer")
        before(gathering, layer, inputs)

    def noted_pass(gathering: Gathering) -> Any:
        seen.append("pass")
        return overlapped(gathering)

    def noted_step(one: Any) -> float:
        seen.append("step")
        return step(one)

    with (
        patch.object(_ParamAndGradBucketGroup, "start_param_sync", noted_start),
        patch.object(Gathering, "_before_layer", noted_before),
        patch.object(Gathering, "overlapped", noted_pass),
        patch.object(optimizer.ModelOptimizer, "step", noted_step),
    ):
        model = open_model(case, overlap)
        worker.learn(model, case.kind, 3)
        seen.append("settle")
        worker.evaluate(model, case.kind)
    hooks = [module for module in model.gpt.modules() if module._forward_pre_hooks]
    assert not hooks, "hooks are left, which would slow down decoding"
    return seen
