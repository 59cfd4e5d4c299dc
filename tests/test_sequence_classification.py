"""Reward models and critics: from and to transformers' sequence classification models with one label."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.convert import export_hf, import_hf, inspect, verify
from nemo_rlhf.convert.families import architecture_of
from nemo_rlhf.models.critic import CriticModel
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.parallel import checkpoint, state
from tests.conftest import write_tokenizer
from tests.spawn import run_distributed

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
KINDS = {"Llama": {}, "Mistral": {"sliding_window": 8}, "Qwen2": {"tie_word_embeddings": True}}
TOKENS = torch.randint(2, 30, (3, 20), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Classifiers of each kind, in bf16 and fp32, written by transformers."""
    import transformers

    made = {}
    for kind, changes in KINDS.items():
        for dtype in (torch.float32, torch.bfloat16):
            directory = tmp_path_factory.mktemp(kind)
            size = write_tokenizer(directory)
            torch.manual_seed(4)
            config = getattr(transformers, f"{kind}Config")(vocab_size=size, num_labels=1, **SIZES, **changes)
            model = getattr(transformers, f"{kind}ForSequenceClassification")(config).to(dtype)
            model.score.weight.data.normal_()
            model.save_pretrained(directory)
            made[f"{kind}/{dtype}"] = directory
    return made


@torch.no_grad()
def scores(directory: Path) -> torch.Tensor:
    """Of every token [B, S], by transformers."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    return model.score(model.base_model(TOKENS).last_hidden_state)[..., 0]


def critic_of(directory: Path, **cut: int) -> Any:
    return open_role(CriticModel, ModelConfig(restore_from=str(directory), **cut), str(directory), "32", 1)


def save_critic(model: Any, target: Path) -> None:
    checkpoint.on_rank_zero(lambda: target.mkdir(parents=True))
    checkpoint.save_model(model.gpt, target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_round_trip_is_bit_exact(directories: dict[str, Path], tmp_path: Path, kind: str, dtype: str) -> None:
    origin = directories[f"{kind}/{dtype}"]
    import_hf(origin, tmp_path / "ckpt")
    said = inspect(tmp_path / "ckpt")
    assert said["heads"] == ["value"] and said["dtype"] == dtype.removeprefix("torch.")
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    before, after = load_file(origin / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys() and "score.weight" in after
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert (tmp_path / "hf" / "config.json").read_bytes() == (origin / "config.json").read_bytes()
    if dtype == "torch.float32":
        (found,) = verify(origin, tmp_path / "ckpt")
        assert found.first_diverging is None and found.max_abs_difference < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_starts_from_one_and_becomes_one(directories: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Also what a training run leaves: fp32 head on a trunk, restored from either format."""
    origin = directories[f"{kind}/torch.float32"]
    state.set_environment_for_one_process()
    state.initialize(1, 1, 1)
    critic = critic_of(origin)
    places = torch.arange(20).expand(3, -1)
    ours = critic.gpt.value_head(critic.gpt(TOKENS, places)).T
    torch.testing.assert_close(ours, scores(origin), atol=1e-4, rtol=0)
    save_critic(critic, tmp_path / "ckpt")
    again = critic_of(tmp_path / "ckpt")
    assert torch.equal(again.gpt.value_head.weight, critic.gpt.value_head.weight)
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    torch.testing.assert_close(scores(tmp_path / "hf"), ours, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_critic_of_a_language_model_becomes_a_classifier(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    origin = tmp_path / "lm"
    size = write_tokenizer(origin)
    LlamaForCausalLM(LlamaConfig(vocab_size=size, **{**SIZES, "pad_token_id": None})).save_pretrained(origin)
    state.set_environment_for_one_process()
    state.initialize(1, 1, 1)
    critic = critic_of(origin)
    critic.gpt.value_head.weight.normal_()
    save_critic(critic, tmp_path / "ckpt")
    shutil.copytree(origin, tmp_path / "ckpt" / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    export_hf(tmp_path / "ckpt", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["pad_token_id"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    batch = AutoTokenizer.from_pretrained(tmp_path / "hf")(["stone", "a river bed"], padding=True, return_tensors="pt")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        ids = batch["input_ids"][row : row + 1, :length]
        value = critic.gpt.value_head(critic.gpt(ids, torch.arange(length)[None]))[-1, 0]
        torch.testing.assert_close(logits[row], value, atol=1e-4, rtol=0)


def worker(payload: dict[str, Path]) -> list[torch.Tensor | None]:
    """Values [B, S] of each classifier under TP2, then written as a checkpoint from that cut."""
    state.initialize(2, 1, 1)
    results = []
    for kind, (origin, target) in payload.items():
        critic = critic_of(origin, tensor_model_parallel_size=2)
        with torch.no_grad():
            results.append(critic.gpt.value_head(critic.gpt(TOKENS, torch.arange(20).expand(3, -1))).T)
        save_critic(critic, target)
        assert kind in KINDS
    return results


def test_tensor_parallel_values_and_export(directories: dict[str, Path], tmp_path: Path) -> None:
    jobs = {kind: (directories[f"{kind}/torch.float32"], tmp_path / kind) for kind in KINDS}
    for rank in run_distributed("tests.test_sequence_classification:worker", 2, jobs):
        for (origin, _), values in zip(jobs.values(), rank, strict=True):
            torch.testing.assert_close(values, scores(origin), atol=1e-4, rtol=0)
    for kind, (origin, target) in jobs.items():
        export_hf(target, tmp_path / f"{kind}-hf")
        before = load_file(origin / "model.safetensors")
        after = load_file(tmp_path / f"{kind}-hf" / "model.safetensors")
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_cannot_be_a_reward_model_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    origin = directories["Llama/torch.float32"]
    config = json.loads((origin / "config.json").read_text())
    with pytest.raises(ValueError, match="names 2 labels; a reward model or critic has one"):
        architecture_of({**config, "id2label": {"0": "A", "1": "B"}})
    with pytest.raises(ValueError, match="has a value head and no output layer: name a language model"):
        open_role(PolicyModel, ModelConfig(restore_from=str(origin)), str(origin), "32", 1)
    import_hf(origin, tmp_path / "ckpt")
    with pytest.raises(ValueError, match="has a value head and no output layer"):
        open_role(PolicyModel, ModelConfig(restore_from=str(origin)), str(tmp_path / "ckpt"), "32", 1)
