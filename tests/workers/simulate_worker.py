"""What tests/test_simulate.py runs in a process of its own: scripts/simulate_70b.py, whole and with faults put in."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo_rlhf.launch.parameters import RoleBytes
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.gpt import GPT

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_70b.py"


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("simulate_70b", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run(cases: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[int, str]]:
    """Exit code and output for every (fault, arguments)."""
    script = load_script()
    found = []
    for fault, arguments in cases:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), _fault(fault, script.planner):
            code = script.main(arguments)
        found.append((code, output.getvalue()))
    return found


def _fault(name: str, planner: Any) -> AbstractContextManager[Any]:
    if name == "none":
        return contextlib.nullcontext()
    if name == "bytes":
        original_bytes = planner.role_bytes

        def too_many(*args: Any, **kwargs: Any) -> RoleBytes:
            planned = original_bytes(*args, **kwargs)
            return replace(planned, optimizer=planned.optimizer + 4)

        return mock.patch.object(planner, "role_bytes", too_many)
    if name == "layers":
        return mock.patch.object(planner, "stage_layers", lambda architecture, pp, stage: range(stage, stage + 2))
    assert name == "tile"
    original = GPT.sharded_state_dict

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Tensor-parallel rank 1 says that it has rank 0's part of one weight."""
        tensors = original(self, *args, **kwargs)
        if state.tp_rank() == 1:
            for key, part in tensors.items():
                if isinstance(part, ShardedTensor) and "layers.1.self_attention.linear_proj" in key:
                    tensors[key] = replace(part, global_offset=(*part.global_offset[:-1], 0))
        return tensors

    return mock.patch.object(GPT, "sharded_state_dict", shifted)
