"""Transformer Engine's own Python on a CPU: its true classes over small bodies for its C extension.

The wheel ``transformer_engine`` holds Python alone; kernels are in other packages. ``install`` lets it be imported
without them: its C extension becomes the functions of ``kernels``, and what it imports beside that an empty stand-in.
So modules, their parameters and states, autograd functions, collectives, the optimizer and every argument that they
give to each other are Transformer Engine's. Kernels and their numerics are not.

Call ``install`` in a process of its own, before megatron-core is imported: both look for each other when imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".transformer_engine"  # one folder a version: scripts/test.sh fills it
_ABSENT = ("onnxscript", "onnx", "triton", "nvdlfw_inspect", "cutlass")


def versions() -> list[str]:
    """Versions that are there, the oldest first."""
    names = [path.name for path in WHEELS.glob("*") if path.is_dir() and not path.name.endswith(".partial")]
    return sorted(names, key=_numbers)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that Transformer Engine imports and that nothing here calls."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".", maxsplit=1)[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__, module.__version__ = [], spec, spec.name, "3.4.0"
        return module

    def exec_module(self, module: Any) -> None:
        pass


def _is_ours(module: Any) -> bool:
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _Absent)


def install(version: str) -> Any:
    """Make ``version`` importable and import it; the CPU stands in for CUDA from then on. Returns the extension that
    takes the place of the compiled one."""
    import torch._dynamo
    import torch.utils.flop_counter

    from tests.transformer_engine import kernels

    os.environ["NVTE_PROJECT_BUILDING"], os.environ["NVTE_RELEASE_BUILD"] = "1", "0"
    extension = kernels.extension()
    sys.modules["transformer_engine_torch"] = extension
    sys.path.insert(0, str(WHEELS / version))
    finder = _Absent()
    sys.meta_path.append(finder)
    try:
        from transformer_engine import common

        common.load_framework_extension = lambda framework: None
        import transformer_engine.pytorch
    finally:
        sys.meta_path.remove(finder)
        # where a real one may be asked for later, it must not find ours
        for name in [name for name, module in sys.modules.items() if _is_ours(module) and name.startswith("triton")]:
            del sys.modules[name]

    from nemo_rlhf import device

    device.install()
    _answer_as_a_gpu(torch)
    kernels.replace_attention(transformer_engine.pytorch.DotProductAttention)
    return extension


def _answer_as_a_gpu(torch: Any) -> None:
    """What Transformer Engine asks of a device beyond what megatron-core asks."""

    class _Device:
        def __init__(self, device: Any) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, *error: Any) -> None:
            pass

    def is_cuda(tensor: Any) -> bool:
        return sys._getframe(1).f_globals["__name__"].startswith("transformer_engine.")

    torch.Tensor.is_cuda = property(is_cuda)  # type: ignore[assignment,method-assign]
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="none")
    cuda = torch.cuda
    cuda.is_available = lambda: True  # which it asserts
    cuda.device = _Device
    cuda.get_device_properties = lambda *args, **kwargs: properties
    cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
