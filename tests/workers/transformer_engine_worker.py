"""What the ranks of tests/test_transformer_engine.py do, each a process with one version of Transformer Engine.

    python -m tests.workers.transformer_engine_worker VERSION PAYLOAD RESULT

with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set as for any rank.
"""

from __future__ import annotations

import sys

from tests.transformer_engine import on_cpu

if __name__ == "__main__":  # before megatron-core, which looks for it when imported
    on_cpu.install(sys.argv[1])

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import megatron.core.optimizer as adams
import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.convert.load import _parameters
from nemo_rlhf.models.base import MegatronModel
from nemo_rlhf.models.critic import CriticModel
from nemo_rlhf.models.ilql import ILQLModel
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.models.reward import RewardModel
from nemo_rlhf.parallel import checkpoint, libraries, state
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.optimizer import ModelOptimizer
from nemo_rlhf.parallel.packing import packed_texts
from tests.workers import families_worker

SPECS = ("local", "transformer_engine")
BOUNDS = [0, 9, 10, 26, 40]  # of packed texts, in a row as long as the tokens that are given


def open_model(
    kind: type[MegatronModel], path: str, spec: str, precision: str = "32", **settings: Any
) -> MegatronModel:
    config = ModelConfig(restore_from=path, layer_spec=spec, **settings)
    sizes = {"ilql_num_q": 2, "ilql_head_width": 24} if kind is ILQLModel else {}
    return open_role(kind, config, path, precision, 0, **sizes)


# ---- the same numbers


def numbers(payload: dict[str, Any]) -> dict[str, Any]:
    """By cut, family and layer spec: hidden states, packed ones, gradients, greedy and drawn tokens."""
    results: dict[str, Any] = {}
    for tp, parallel in payload["cuts"]:
        state.initialize(tp, 1, seed=1)
        for name, path in payload["directories"].items():
            if tp > 1 and (name in payload["one_group"] or (name in payload["experts"] and not parallel)):
                continue
            for spec in SPECS:
                model = open_model(PolicyModel, path, spec, sequence_parallel=parallel).gpt
                results[tp, parallel, name, spec] = _numbers(model, payload)
    return results


def _numbers(model: GPT, payload: dict[str, Any]) -> dict[str, Any]:
    tokens = payload["tokens"]
    results = {
        "classes": sorted({type(m).__module__.partition(".")[0] + "." + type(m).__name__ for m in model.modules()}),
        "hidden": _hidden(model, tokens, torch.arange(tokens.size(1)).expand_as(tokens)),
        "packed": _packed(model, tokens[:1]),
        "greedy": families_worker.generate(model, payload["prompts"]),
        "gradients": families_worker.gradients(model, tokens),
        "fused": [m.fuse_wgrad_accumulation for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")],
    }
    for module in model.modules():
        if hasattr(module, "is_first_microbatch"):
            module.register_forward_pre_hook(lambda module, inputs: setattr(module, "is_first_microbatch", True))
    results["gradients, always the first"] = families_worker.gradients(model, tokens)
    return results


@torch.no_grad()
def _hidden(model: GPT, tokens: Tensor, positions: Tensor, **how: Any) -> Tensor:
    hidden = model(tokens, positions, **how)
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=state.tp_group())
    return hidden


def _packed(model: GPT, tokens: Tensor) -> Tensor:
    packing = packed_texts(torch.tensor(BOUNDS))
    return _hidden(model, tokens, packing.positions, packed_seq_params=packing)


# ---- checkpoints


ROLES: dict[str, type[MegatronModel]] = {
    "policy": PolicyModel,
    "critic": CriticModel,
    "reward": RewardModel,
    "ilql": ILQLModel,
}


def checkpoints(payload: dict[str, Any]) -> dict[str, Any]:
    """By family, role, writer and reader: names of parameters that differ from what was written."""
    state.initialize(payload["tp"], 1, seed=1)
    results: dict[str, Any] = {}
    root = Path(payload["root"])
    for family, (hf, imported) in payload["sources"].items():
        parallel = payload["tp"] > 1
        for role, kind in ROLES.items():
            written = {spec: open_model(kind, hf, spec, sequence_parallel=parallel) for spec in SPECS}
            expected = {spec: weights_of(model.gpt) for spec, model in written.items()}
            assert expected["local"].keys() == expected["transformer_engine"].keys()
            sources = {"import": imported}
            for spec, model in written.items():
                path = root / f"{family}-{role}-{spec}-{payload['tp']}"
                checkpoint.on_rank_zero(partial(path.mkdir, parents=True))
                checkpoint.save_model(model.gpt, path)
                sources[spec] = str(path)
            for writer, source in sources.items():
                for reader in SPECS:
                    read = weights_of(open_model(kind, source, reader, sequence_parallel=parallel).gpt)
                    wanted = expected["local"]
                    results[family, role, writer, reader] = [
                        name for name in wanted if not torch.equal(read[name], wanted[name])
                    ]
    return results


def weights_of(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in _parameters(model)}


# ---- optimizers


class ApexLikeAdam(torch.optim.Optimizer):
    """As apex's FusedAdam is seen from outside: steps counted in groups, options of its own, moments made at the first
    step. Its arithmetic is AdamW's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,  # megatron-core 0.19 gives it
    ) -> None:
        assert adam_w_mode and not capturable
        options = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, options | {"weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            assert isinstance(group["step"], int) and group["bias_correction"]
            first, second = group["betas"]
            for parameter in group["params"]:
                entry = self.state[parameter]
                if not entry:
                    entry["exp_avg"], entry["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
                entry["exp_avg"].lerp_(parameter.grad, 1 - first)
                entry["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - second)
                mean = entry["exp_avg"] / (1 - first ** group["step"])
                deviation = (entry["exp_avg_sq"] / (1 - second ** group["step"])).sqrt() + group["eps"]
                parameter.sub_(group["lr"] * (mean / deviation + group["weight_decay"] * parameter))


@contextmanager
def adam(kind: str) -> Iterator[None]:
    """Inside, megatron finds this Adam, as if it had been the first that could be imported."""
    engines = {"transformer_engine": adams.Adam, "apex": ApexLikeAdam, "torch": torch.optim.AdamW}
    with (
        mock.patch.object(adams, "Adam", engines[kind]),
        mock.patch.object(adams, "USING_PYTORCH_OPTIMIZER", kind == "torch"),
        mock.patch.object(distrib_optimizer, "Adam", engines[kind]),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", kind != "torch"),
        mock.patch.object(distrib_optimizer, "USING_TE_OPTIMIZER", kind == "transformer_engine"),
        mock.patch.object(distrib_optimizer, "USING_APEX_OPTIMIZER", kind == "apex"),
    ):
        yield


KINDS = ("torch", "transformer_engine", "apex")
MOMENTS = ("before the first step", "after two steps", "after a new start")
OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.0)


class Learner:
    """A model whose gradients are made up, and depend on the number of the step alone."""

    def __init__(self, path: str, kind: str) -> None:
        self.kind = kind
        with adam(kind):
            self.model = open_model(PolicyModel, path, "transformer_engine", "bf16").gpt
            self.learner = ModelOptimizer(self.model, OPTIM, 100)

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.learner.zero_grad()
        for parameter in self.model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[attr-defined]
        with adam(self.kind):
            self.learner.step()

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        with adam(self.kind):
            checkpoint.save_tensors(self.learner.sharded_state_dict(loading=False), directory)

    def load(self, directory: Path) -> None:
        with adam(self.kind):
            wanted = self.learner.sharded_state_dict(loading=True)
            self.learner.load_state_dict(checkpoint.load_tensors(wanted, directory))

    def main(self) -> Tensor:
        groups = self.learner.optimizer.param_groups
        return torch.cat([parameter.detach().flatten() for group in groups for parameter in group["params"]])


def optimizers(payload: dict[str, Any]) -> dict[str, Any]:
    """By moment of saving, kind that saves and kind that goes on: (main weights after two steps more, those of a run
    that was not interrupted)."""
    state.initialize(1, 1, seed=1)
    results: dict[str, Any] = {}
    for moment in MOMENTS:
        for writer in KINDS:
            one = Learner(payload["path"], writer)
            if moment != "before the first step":
                one.step(1)
                one.step(2)
            if moment == "after a new start":
                one.learner.start_anew()
            directory = Path(payload["root"]) / f"{moment}-{writer}"
            one.save(directory)
            before = one.main()
            for number in (3, 4):
                one.step(number)
            for reader in KINDS:
                other = Learner(payload["path"], reader)
                other.load(directory)
                loaded = other.main()
                for number in (3, 4):
                    other.step(number)
                results[moment, writer, reader] = (loaded, before), (other.main(), one.main())
    return results


def kept(payload: list[Any]) -> dict[str, int]:
    """Bytes that autograd keeps of a model at most, by case."""
    from tests.workers import plan_worker

    return {name: found.activations for name, found in plan_worker.measure(payload).items()}


def spoken(payload: None) -> dict[str, str]:
    return libraries.in_use("transformer_engine")


def main(payload: Path, result: Path) -> None:
    state.set_environment_for_one_process()
    torch.set_num_threads(1)
    asked = torch.load(payload, weights_only=False)
    torch.save({name: globals()[name](given) for name, given in asked.items()}, result)


if __name__ == "__main__":
    main(Path(sys.argv[2]), Path(sys.argv[3]))
