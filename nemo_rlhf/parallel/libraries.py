"""Whose kernels a run uses: Transformer Engine's or torch's layers, which Adam, which attention."""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, cast

import megatron.core.optimizer
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from nemo_rlhf import device

LayerSpec = Literal["transformer_engine", "local"]
_ENGINE = "transformer_engine"


def choose_layer_spec(asked: str) -> LayerSpec:
    """The layer spec to build models of.

    Args:
        asked: "auto" is Transformer Engine on a GPU where it is installed, and otherwise local.

    Raises:
        ValueError: Transformer Engine is asked for, or installed beside a GPU, and cannot be imported.
    """
    if asked == "auto":
        asked = _ENGINE if device.is_cuda() and importlib.util.find_spec(_ENGINE) is not None else "local"
    if asked == _ENGINE and (problem := _engine_problem()) is not None:
        raise ValueError(f"{problem}: install one that fits, or set model.layer_spec=local to do without it.")
    return cast("LayerSpec", asked)


def _engine_problem() -> str | None:
    """Why Transformer Engine cannot be used, if it cannot. Its package hides a failed import of its torch part, and
    megatron-core then takes it for absent."""
    if importlib.util.find_spec(_ENGINE) is None:
        return "Transformer Engine is not installed"
    try:
        importlib.import_module(f"{_ENGINE}.pytorch")
    except Exception as error:  # whatever a foreign library makes of a wrong CUDA, cuDNN or torch
        why = " ".join(str(error).split())[:300]
        return f"Transformer Engine {_version(_ENGINE)} is installed and cannot be imported ({why})"
    if not HAVE_TE:
        return f"megatron-core {_version('megatron-core')} cannot use Transformer Engine {_version(_ENGINE)}"
    return None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"


def _flash_attention() -> str | None:
    return f"flash-attn {_version('flash-attn')}" if importlib.util.find_spec("flash_attn") is not None else None


def in_use(layer_spec: LayerSpec) -> dict[str, str]:
    """What computes layers, attention and optimizer steps of a run, in words, by those names."""
    adam: Any = megatron.core.optimizer.Adam
    steps = f"{adam.__module__.partition('.')[0]} {adam.__name__}"
    if layer_spec == "local":
        return {"layers": f"local, torch {torch.__version__}", "attention": _local_attention(), "optimizer": steps}
    return {"layers": f"Transformer Engine {_version(_ENGINE)}", "attention": _engine_attention(), "optimizer": steps}


def _local_attention() -> str:
    if not device.is_cuda():
        return "torch"
    return f"torch without cuDNN, packed texts by {_flash_attention() or 'torch'}"


def _engine_attention() -> str:
    """What Transformer Engine may choose from; which one it takes depends on shapes and is its own affair."""
    flash = _flash_attention() if os.environ.get("NVTE_FLASH_ATTN", "1") != "0" else None
    cudnn = torch.backends.cudnn.version() if os.environ.get("NVTE_FUSED_ATTN", "1") != "0" else None
    offered = [name for name in (flash, cudnn and f"cuDNN {cudnn}") if name]
    return f"{' or '.join(offered) or 'unfused'}, decoding by torch"
