"""What only a GPU shows: the same code on CUDA, in fp32 and bf16, with offloading that really frees device memory.

Skipped without CUDA. All in one process, one GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights and a tokenizer of letters, as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("hf")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz ."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # spread enough for distributions that are not flat
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model.save_pretrained(directory)
    return directory


def ppo(model_dir: Path, run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    import nemo_rlhf
    from nemo_rlhf.cli.run import run_ppo

    config = nemo_rlhf.config(
        "ppo",
        overrides=[
            f"exp_manager.explicit_log_dir={run_dir}",
            "trainer.max_steps=3",
            "ppo.num_prompts=16",
            "ppo.samples_per_prompt=2",
            "ppo.epochs=2",
            "model.global_batch_size=16",
            "model.micro_batch_size=8",
            "model.optim.lr=1e-4",
            "generation.max_new_tokens=24",
            "generation.num_slots=8",
            *overrides,
        ],
    )
    config.model.restore_from = str(model_dir)

    def reward(outputs: list[str], **_: Any) -> list[float]:
        return [output.count("a") / 4 for output in outputs]

    prompts = [{"prompt": f"{letter} b"} for letter in "abcdefghijklmnop"]
    assert run_ppo(config, reward_fn=reward, prompts=prompts) == 0
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_greedy_generation_equals_transformers(model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nemo_rlhf.algorithms.roles import open_role
    from nemo_rlhf.config.schema import ModelConfig
    from nemo_rlhf.generation.engine import Engine
    from nemo_rlhf.generation.sampling import SamplingParams
    from nemo_rlhf.models.policy import PolicyModel
    from nemo_rlhf.parallel import state
    from nemo_rlhf.types import Prompt, Request

    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    policy = open_role(PolicyModel, ModelConfig(restore_from=str(model_dir)), str(model_dir), "32", 1)
    engine = Engine(policy.gpt, tokenizer, num_slots=3, max_sequence_length=128)
    texts = ["abc", "q", "hello world", "zzzz."]
    requests = [Request(Prompt(tuple(tokenizer(t)["input_ids"]), t), i) for i, t in enumerate(texts)]
    samples = engine.generate(requests, SamplingParams(max_new_tokens=40, temperature=0.0, ignore_eos=True))
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).cuda().eval()
    reference.generation_config.eos_token_id = None  # min_new_tokens would forbid EOS, ignore_eos only goes on
    for sample, text in zip(samples, texts, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"].cuda()
        out = reference.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)
        assert sample.response_ids == tuple(out[0, ids.size(1) :].tolist())


def test_offload_changes_nothing_in_fp32(model_dir: Path, tmp_path: Path) -> None:
    plain = ppo(model_dir, tmp_path / "plain")
    moved = ppo(model_dir, tmp_path / "moved", "ppo.offload=[optimizer,critic,reference]")
    swapped = ppo(model_dir, tmp_path / "swapped", "ppo.reference=swap")
    assert plain[0]["check/ratio_step0"] == pytest.approx(1.0, abs=1e-5)
    assert plain[0]["check/kl_step0"] == pytest.approx(0.0, abs=1e-6)
    for row, other, third in zip(plain, moved, swapped, strict=True):
        for name in ("reward/mean", "kl/mean", "loss/policy", "loss/value", "grad_norm/policy", "grad_norm/critic"):
            assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-6), name
            assert third[name] == pytest.approx(row[name], rel=1e-3, abs=1e-6), name


def test_bf16_learns_and_resumes(model_dir: Path, tmp_path: Path) -> None:
    save = "exp_manager.checkpoint_callback_params.every_n_train_steps=3"
    rows = ppo(model_dir, tmp_path / "run", "trainer.precision=bf16", "ppo.offload=[optimizer,critic,reference]", save)
    assert abs(rows[0]["check/ratio_step0"] - 1) < 0.05 and rows[0]["check/kl_step0"] < 0.05
    assert all(row["grad_norm/policy"] > 0 and row["grad_norm/critic"] > 0 for row in rows)
    rows = ppo(model_dir, tmp_path / "run", "trainer.precision=bf16", "trainer.max_steps=5", save)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_offload_frees_device_memory() -> None:
    from nemo_rlhf.parallel.offload import Offload

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    base = torch.randn(2**24, device="cuda")
    view, expected = base[: 2**20].view(2**10, 2**10), base.clone().cpu()
    offload = Offload([base, view])
    offload.out()
    assert torch.cuda.memory_allocated() - before < 2**20
    offload.back()
    assert torch.equal(base.cpu(), expected) and torch.equal(view.cpu().view(-1), expected[: 2**20])
