"""Generates with the real model on whatever ranks the launcher started; also called in the test's own process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_rlhf.convert.load import load_weights, open_source, read_architecture
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.gpt import GPT, build_gpt
from nemo_rlhf.types import Request, Sample

MAX_SEQUENCE_LENGTH = 96


@dataclass(frozen=True)
class Run:
    """One call of the engine. ``eos`` replaces the tokenizer's EOS token; ``generation_eos_ids`` are what
    generation_config.json would name beside it."""

    requests: tuple[Request, ...]
    sampling: SamplingParams
    num_slots: int
    eos: str | None = None
    generation_eos_ids: tuple[int, ...] = ()


def load_model(directory: Path, tensor_parallel: int, pipeline_parallel: int, **build: Any) -> GPT:
    state.initialize(tensor_parallel, pipeline_parallel, seed=1)
    architecture = read_architecture(directory)
    model = build_gpt(architecture, **build)
    load_weights(model, open_source(directory), architecture)
    return model


def generate(directory: Path, cut: tuple[int, int], runs: Sequence[Run], **build: Any) -> list[tuple[Sample, ...]]:
    from transformers import AutoTokenizer

    model = load_model(directory, *cut, **build)
    results = []
    for run in runs:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if run.eos is not None:
            tokenizer.add_special_tokens({"eos_token": run.eos})
        tokenizer.generation_eos_ids = run.generation_eos_ids
        engine = Engine(model, tokenizer, num_slots=run.num_slots, max_sequence_length=MAX_SEQUENCE_LENGTH)
        results.append(engine.generate(run.requests, run.sampling))
        assert model.training, "the model's mode must be restored"
    return results


def generate_in_cuts(payload: dict[str, Any]) -> dict[tuple[int, int], list[tuple[Sample, ...]]]:
    """payload: ``directory``, ``cuts`` (each of the whole world), ``runs``. Sequence parallelism is on where TP is, to
    see that the engine does without it."""
    return {
        cut: generate(payload["directory"], cut, payload["runs"], sequence_parallel=cut[0] > 1)
        for cut in payload["cuts"]
    }


def fail_on_nan(payload: dict[str, Any]) -> list[str]:
    """The sentences that every rank raises, time after time, when the weights of the last stage are damaged."""
    from transformers import AutoTokenizer

    model = load_model(payload["directory"], *payload["cut"])
    if state.is_last_stage():
        with torch.no_grad():
            model.decoder.final_layernorm.weight[3] = torch.nan
    else:  # the last stage has given up long before the others have heard of it
        model.register_forward_pre_hook(lambda *_: time.sleep(0.05))
    tokenizer = AutoTokenizer.from_pretrained(payload["directory"])
    engine = Engine(model, tokenizer, num_slots=4, max_sequence_length=MAX_SEQUENCE_LENGTH)
    sentences = []
    for _ in range(8):
        try:
            engine.generate(payload["requests"], SamplingParams(4))
        except ValueError as error:
            sentences.append(str(error))
    return sentences
