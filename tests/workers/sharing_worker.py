"""What four ranks of tests/test_saving.py do: save and load what several of them hold, and count bytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import state_dict_utils
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import fully_parallel
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.parallel import checkpoint, state
from nemo_rlhf.parallel.gpt import GPT, build_gpt
from nemo_rlhf.parallel.optimizer import ModelOptimizer
from nemo_rlhf.parallel.saver import Saver
from tests.workers.parallel_worker import OPTIM
from tests.workers.saving_worker import ARCHITECTURE

DENSE = replace(ARCHITECTURE, num_layers=3, hidden_size=128, kv_channels=32, ffn_hidden_size=344, vocab_size=1501)
SPARSE = replace(DENSE, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=172)
CUTS = {  # TP, EP, model; what is left is DP
    "DP4": (1, 1, DENSE),
    "TP2 x DP2": (2, 1, DENSE),
    "DP4, EP2": (1, 2, SPARSE),
    "TP2 x DP2, EP1": (2, 1, SPARSE),
}
STATES = ("param", "exp_avg", "exp_avg_sq")


def run(place: str) -> dict[str, Any]:
    found = {}
    for number, (name, (tp, ep, architecture)) in enumerate(CUTS.items()):
        state.initialize(tp, 1, seed=1, expert_parallel=ep)
        found[name] = _case(architecture, Path(place) / str(number))
    return found


def _case(architecture: Architecture, directory: Path) -> dict[str, Any]:
    gpt, learner = _model(architecture)
    held = dict(_held(gpt, learner))
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))))
    gpt.zero_vocabulary_padding()
    kept = {name: tensor.clone() for name, tensor in held.items()}

    def write(partial: Path) -> None:
        checkpoint.save_model(gpt, partial / "model")
        checkpoint.on_rank_zero((partial / "optimizer").mkdir)
        checkpoint.save_tensors(learner.sharded_state_dict(loading=False), partial / "optimizer")

    found: dict[str, Any] = {"hosted": [_hosted(learner, loading) for loading in (False, True)]}
    found["largest"] = max(tensor.numel() for tensor in gpt.parameters())
    for way in ("in the foreground", "in the background"):
        path, looks = directory / way, mock.Mock(wraps=fully_parallel.determine_global_metadata)
        with (
            _counted() as count,
            mock.patch.object(state_dict_utils, "determine_global_metadata", looks),
            mock.patch.object(fully_parallel, "determine_global_metadata", looks),
        ):
            saver = Saver(way == "in the background", 60)
            saver.save(path, write)
            saver.wait()
        found[way] = {"saved": count, "looks": looks.call_count, **_sizes(path)}
        checkpoint.verify(path)
        other, its = _model(architecture)
        with _counted() as count:
            checkpoint.load_model(other, path / "model")
            wanted = its.sharded_state_dict(loading=True)
            its.load_state_dict(checkpoint.load_tensors(wanted, path / "optimizer"))
        resumed = dict(_held(other, its))
        differ = [name for name, value in kept.items() if not torch.equal(resumed[name], value)]
        found[way] |= {"loaded": count, "resumed": len(resumed), "differ": differ}
    return found


def _model(architecture: Architecture) -> tuple[GPT, ModelOptimizer]:
    gpt = build_gpt(architecture, dtype=torch.bfloat16, sequence_parallel=state.tp_size() > 1)
    learner = ModelOptimizer(gpt, OPTIM, 4)
    learner.sharded_state_dict(loading=True)  # makes moments
    return gpt, learner


def _held(gpt: GPT, learner: ModelOptimizer) -> Iterator[tuple[str, Tensor]]:
    """Weights and what this rank has of the optimizer's state, by names that are alike where values have to be."""
    names = {}
    for name, parameter in gpt.named_parameters():
        if not getattr(parameter, "allreduce", True):
            name = f"{name} of {state.ep_rank()}"
        elif getattr(parameter, "tensor_model_parallel", False):
            name = f"{name} of {state.tp_rank()}"
        names[parameter] = name
        yield name, parameter.data
    for part in learner.optimizer.chained_optimizers:
        for parameter in part.model_param_group_index_map:
            tensors = part._get_main_param_and_optimizer_states(parameter)
            for key in STATES:
                yield f"{key} of {names[parameter]} at {part.data_parallel_group.rank()}", tensors[key].data


def _hosted(learner: ModelOptimizer, loading: bool) -> int:
    """Bytes on the host of what this rank describes of the optimizer's state."""
    described = nested_values(learner.sharded_state_dict(loading=loading))
    tensors = [part.data for part in described if isinstance(part, ShardedBase)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Bytes that this process, and those that it has waited for, read (``rchar``) and wrote (``wchar``) inside. What
    ranks send each other is among the latter only."""
    dist.barrier()
    found: dict[str, int] = {}
    before = _io()
    yield found
    found |= {name: value - before[name] for name, value in _io().items()}


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines) if name in ("rchar", "wchar")}


def _sizes(path: Path) -> dict[str, Any]:
    """Of each part of the checkpoint the number of tensors and bytes by the rank that wrote them; bytes of all else."""
    files = [file for file in path.rglob("*") if file.is_file()]
    sizes, tensors = {}, {}
    for part in ("model/weights", "optimizer"):
        mine = [list((path / part).glob(f"__{rank}_*.distcp")) for rank in range(4)]
        sizes[part] = [sum(file.stat().st_size for file in of_rank) for of_rank in mine]
        tensors[part] = len(FileSystemReader(path / part).read_metadata().storage_data)
    rest = sum(file.stat().st_size for file in files if file.suffix != ".distcp")
    return {"sizes": sizes, "tensors": tensors, "rest": rest}
