"""What the ranks of tests/test_frozen_layers.py do: two steps, with and without saving in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.convert.load import load_weights
from nemo_rlhf.convert.source import RandomSource
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.parallel import state
from tests.test_shapes import ARCHITECTURE


def open_model() -> PolicyModel:
    """Its last layer learns, and what stands behind."""
    model = PolicyModel(ModelConfig(restore_from=""), ARCHITECTURE, "32")
    load_weights(model.gpt, RandomSource(ARCHITECTURE, 4), ARCHITECTURE)
    model.gpt.has_frozen_layers = True
    for layer in model.gpt.decoder.layers:
        layer.requires_grad_(layer.layer_number == ARCHITECTURE.num_layers)
    if model.gpt.pre_process:
        model.gpt.embedding.requires_grad_(False)
    model.make_trainable(OptimConfig(lr=1e-2), 4)
    return model


def step(model: PolicyModel, number: int) -> None:
    assert model.learner is not None
    generator = torch.Generator().manual_seed(number)
    model.learner.zero_grad()
    for _, parameter in sorted(model.gpt.named_parameters()):
        gradient = torch.randn(parameter.shape, generator=generator)
        if parameter.requires_grad:
            parameter.main_grad.copy_(gradient)  # type: ignore[attr-defined]
    model.learner.step()


def weights(model: PolicyModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.gpt.named_parameters()}


def run(payload: dict[str, Any]) -> dict[str, Any]:
    state.initialize(1, payload["pp"], seed=1)
    model, path = open_model(), Path(payload["path"])
    start = weights(model)
    step(model, 1)
    model.save_training_state(path)
    step(model, 2)
    again = open_model()
    step(again, 1)  # weights are loaded from elsewhere; moments come from the file
    again.load_training_state(path)
    step(again, 2)
    end = weights(model)
    moved = [name for name in end if not torch.equal(end[name], start[name])]
    frozen = [name for name, parameter in model.gpt.named_parameters() if name in moved and not parameter.requires_grad]
    return {"uninterrupted": end, "resumed": weights(again), "moved": moved, "frozen": frozen}
