"""What only a GPU shows: the same code on CUDA, in fp32 and bf16, with kernels that a CPU does not have, and offloading
that really frees device memory.

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
            "exp_manager.create_tensorboard_logger=false",
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


def of_llama(model_dir: Path, layer_spec: str, precision: str) -> Any:
    from nemo_rlhf.algorithms.roles import open_role
    from nemo_rlhf.config.schema import ModelConfig
    from nemo_rlhf.models.policy import PolicyModel
    from nemo_rlhf.parallel import state

    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    config = ModelConfig(restore_from=str(model_dir), layer_spec=layer_spec)
    return open_role(PolicyModel, config, str(model_dir), precision, 1).gpt


def test_attention_is_not_left_to_cudnn(model_dir: Path) -> None:
    of_llama(model_dir, "local", "bf16")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_gradients_of_weights_that_products_add_up(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two microbatches: Transformer Engine's products add to the main gradients, or somebody else does."""
    pytest.importorskip("transformer_engine.pytorch")
    from nemo_rlhf.parallel import optimizer
    from tests.workers.families_worker import gradients

    tokens = torch.randint(2, 28, (2, 24), generator=torch.Generator().manual_seed(3))
    model = of_llama(model_dir, "transformer_engine", "32")
    fused = gradients(model, tokens)
    switches = [m.fuse_wgrad_accumulation for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
    assert switches and all(switches)
    monkeypatch.setattr(optimizer, "_accumulate_in_products", lambda model: None)
    plain = gradients(of_llama(model_dir, "transformer_engine", "32"), tokens)
    assert fused.keys() == plain.keys()
    for name, gradient in plain.items():
        assert float(gradient.abs().max()) > 0, name
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_logits_are_not_rounded_to_16_bits() -> None:
    from nemo_rlhf.parallel.logprobs import fp32_product

    if not hasattr(torch.ops.aten.mm, "dtype"):
        pytest.skip(f"torch {torch.__version__} has no product of 16-bit tensors in fp32")
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(rows, 512, device="cuda", generator=generator).bfloat16() for rows in (64, 1000))
    logits, exact = fp32_product(hidden, weight), hidden.double() @ weight.double().t()
    assert logits.dtype == torch.float32
    error = float((logits - exact).abs().max())
    rounded = float(((hidden @ weight.t()).double() - exact).abs().max())
    assert error < 1e-3 < rounded


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("groups", [8, 2])
def test_packed_attention_in_one_kernel(groups: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equals attention of text after text, forwards and backwards, to what bf16 can tell."""
    from types import SimpleNamespace

    from nemo_rlhf.parallel import attention
    from nemo_rlhf.parallel.packing import packed_texts

    if attention._varlen_kernel() is None:
        pytest.skip("neither flash-attn nor a torch whose varlen_attn knows windows and grouped heads")
    packing = packed_texts(torch.tensor([0, 40, 41, 96, 128], dtype=torch.int32))
    config = SimpleNamespace(attention_dropout=0.0, sequence_parallel=False)
    core = attention.SDPACoreAttention.__new__(attention.SDPACoreAttention)
    torch.nn.Module.__init__(core)
    core.config, core.window, core.softmax_scale, core.dropout = config, window, 64**-0.5, 0.0
    generator = torch.Generator("cuda").manual_seed(0)
    given = [torch.randn(128, heads, 64, device="cuda", generator=generator) for heads in (8, groups, groups)]
    upstream = torch.randn(128, 8 * 64, device="cuda", generator=generator)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (y.bfloat16() for y in given)]
        out = core._packed(*leaves, packing)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    kernel = run(torch.bfloat16)
    exact = run(torch.float32)  # fp32 goes by the loop
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: None)
    loop = run(torch.bfloat16)
    for found, by_loop, expected in zip(kernel, loop, exact, strict=True):
        assert found.dtype == torch.bfloat16
        error, usual = ((x.float() - expected).abs().max() for x in (found, by_loop))
        assert error < 4 * usual + 1e-3  # a key of another text would show in the first digit


def test_pinned_memory_copies_right() -> None:
    from nemo_rlhf import device

    num_bytes = 3 * 2**20 + 40  # not a whole number of pages
    pinned = device.pinned_empty(num_bytes)
    assert pinned.numel() * pinned.element_size() == num_bytes and pinned.is_pinned()
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device="cuda")
    pinned.view(torch.uint8).copy_(source, non_blocking=True)
    back = torch.empty_like(source)
    back.copy_(pinned.view(torch.uint8), non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(back, source) and torch.equal(pinned.view(torch.uint8), source.cpu())
