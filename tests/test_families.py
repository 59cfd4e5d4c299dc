"""Dense families against transformers: logits, gradients and greedy tokens under every cut, and the same bits back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.families import architecture_of, weight_map
from nemo_rlhf.convert.load import RandomSource
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.convert.mapping import Cut
from nemo_rlhf.convert.transfer import export_hf, import_hf
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.gpt import padded_vocab_size
from tests.spawn import run_distributed
from tests.test_convert import assert_same_weights
from tests.workers import families_worker as worker

WORKER = "tests.workers.families_worker:run"
VOCAB, LENGTH, WINDOW = 131, 40, 12
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 36,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "n_inner": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWED = {"sliding_window": WINDOW, "use_sliding_window": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", COMMON | {"sliding_window": WINDOW, "num_key_value_heads": 4}),
    "mistral_one_group": ("Mistral", COMMON | {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 6}),
    "qwen2": ("Qwen2", COMMON | WINDOWED | {"max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2_one_group": ("Qwen2", COMMON | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", COMMON | WINDOWED | {"head_dim": 10, "layer_types": ["sliding_attention", "full_attention"]}),
    "qwen3_tied": ("Qwen3", COMMON | {"head_dim": 14, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gemma": ("Gemma", COMMON | {"head_dim": 14, "pad_token_id": None}),
    "gemma_one_group": (
        "Gemma",
        COMMON | {"head_dim": 6, "num_key_value_heads": 1, "tie_word_embeddings": False, "pad_token_id": None},
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2_untied": ("GPT2", GPT2 | {"n_inner": None, "tie_word_embeddings": False}),
}
ONE_GROUP = [name for name in CASES if name.endswith("one_group")]
CUTS = ["1x1", "2x1", "1x2", "2x2"]
_generator = torch.Generator().manual_seed(3)
TOKENS = torch.randint(0, VOCAB, (2, LENGTH), generator=_generator)
PROMPTS = [torch.randint(0, VOCAB, (length,), generator=_generator).tolist() for length in (5, 17, 1)]


def make_model(name: str) -> Any:
    """A tiny model of transformers whose weights are large enough that every detail shows."""
    import transformers

    family, settings = CASES[name]
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            tied = model.config.tie_word_embeddings and parameter is model.get_input_embeddings().weight
            # a tied model would say its input again and again
            noise = (0.06 if tied else 0.3) * torch.randn(parameter.shape, generator=generator)
            scale = ("norm" in key or ".ln_" in key) and "bias" not in key and family != "Gemma"
            parameter.copy_(1 + noise if scale else noise)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: make_model(name) for name in CASES}


@pytest.fixture(scope="module")
def payload(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("families")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {
        "directories": {name: str(root / name) for name in models},
        "one_group": ONE_GROUP,
        "tokens": TOKENS,
        "prompts": PROMPTS,
        "save": None,
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one_process() -> None:
    state.set_environment_for_one_process()


@pytest.fixture(scope="module")
def computed(payload: dict[str, Any], checkpoints: Path, one_process: None) -> dict[str, list[dict[str, Any]]]:
    """Results by cut, of each rank; the checkpoints are those of TP2 x PP2."""
    here = worker.run(payload | {"cuts": [(1, 1, False)]})
    two = run_distributed(WORKER, 2, payload | {"cuts": [(2, 1, True), (1, 2, False)]})
    four = run_distributed(WORKER, 4, payload | {"cuts": [(2, 2, False)], "save": str(checkpoints)})
    ranks = {"1x1": [here], "2x1": two, "1x2": two, "2x2": four}
    return {cut: [result[cut] for result in results] for cut, results in ranks.items()}


def cases(cut: str) -> list[str]:
    return [name for name in CASES if cut.startswith("1") or name not in ONE_GROUP]


EVERY = [(cut, name) for cut in CUTS for name in cases(cut)]


@pytest.mark.parametrize(("cut", "name"), EVERY)
def test_logits_equal_those_of_transformers(cut: str, name: str, models: dict[str, Any], computed: Any) -> None:
    with torch.no_grad():
        expected = models[name](TOKENS).logits
    assert expected.abs().max() > 0.5
    found = [rank[f"{name}/logits"] for rank in computed[cut] if rank[f"{name}/logits"] is not None]
    assert len(found) == int(cut[0])
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("cut", "name"), EVERY)
def test_greedy_tokens_equal_those_of_transformers(cut: str, name: str, models: dict[str, Any], computed: Any) -> None:
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = models[name].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=worker.NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        for rank in computed[cut]:
            assert rank[f"{name}/greedy"][number] == tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize(("cut", "name"), EVERY)
def test_gradients_equal_those_of_transformers(cut: str, name: str, models: dict[str, Any], computed: Any) -> None:
    model = models[name]
    model.zero_grad()
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    found = {key: torch.full_like(grad, torch.nan) for key, grad in expected.items()}
    for rank in computed[cut]:
        for key, grad in rank[f"{name}/gradients"].items():
            here = ~grad.isnan()
            torch.testing.assert_close(grad[here], expected[key][here], atol=2e-6, rtol=1e-4, msg=f"{name}: {key}")
            found[key][here] = grad[here]
    assert not [key for key, grad in found.items() if grad.isnan().any()]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ONE_GROUP])
def test_a_checkpoint_of_four_ranks_gives_the_same_bits(
    name: str, payload: dict[str, Any], computed: Any, checkpoints: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    origin = Path(payload["directories"][name])
    result = export_hf(checkpoints / name, tmp_path / name)
    assert_same_weights(origin, result)
    _, info = AutoModelForCausalLM.from_pretrained(result, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_released_gpt2_is_its_trunk_with_causal_masks(payload: dict[str, Any], tmp_path: Path) -> None:
    origin = Path(payload["directories"]["gpt2"])
    released = Path(shutil.copytree(origin, tmp_path / "released"))
    tensors = load_file(released / "model.safetensors")
    tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    save_file(tensors | masks, released / "model.safetensors", metadata={"format": "pt"})
    import_hf(released, tmp_path / "checkpoint")
    assert_same_weights(origin, export_hf(tmp_path / "checkpoint", tmp_path / "result"))


@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_bf16_rounds_where_transformers_does(name: str, payload: dict[str, Any], one_process: None) -> None:
    """Embeddings, scaled or with positions, and the first norm, zero-centred or with a bias."""
    model = make_model(name).bfloat16()
    trunk = model.transformer if name == "gpt2" else model.model
    norm = trunk.h[0].ln_1 if name == "gpt2" else trunk.layers[0].input_layernorm
    with torch.no_grad():
        expected = trunk(TOKENS, output_hidden_states=True).hidden_states[0]
        embedded, normed = worker.beginning(payload["directories"][name], TOKENS)
        assert torch.equal(embedded, expected)
        assert torch.equal(normed, norm(expected))


@pytest.mark.parametrize("name", CASES)
def test_table_and_counts(name: str, models: dict[str, Any], payload: dict[str, Any]) -> None:
    """Each element of each tensor has one place; the number of parameters and the window are those of transformers."""
    architecture = read_architecture(payload["directories"][name])
    weights = weight_map(architecture)
    assert weights.num_parameters() == models[name].num_parameters()
    for tp in (1, 2) if name not in ONE_GROUP else (1,):
        for entry in weights.entries.values():
            taken = [torch.zeros(shape) for shape in entry.shapes]
            for rank in range(tp):
                cut = Cut(rank, tp, padded_vocab_size(VOCAB, tp))
                placed = torch.zeros(entry.local_shape(cut))
                for piece in entry.pieces(cut):
                    outside = taken[piece.tensor][piece.outside]
                    inside = placed[piece.inside]
                    assert (outside.T if entry.row.layout.transposed else outside).shape == inside.shape
                    outside += 1
                    inside += 1
                assert placed.max() == 1
                assert placed.min() == 1 or "word_embeddings" in entry.megatron or "output_layer" in entry.megatron
            counts = {tensor.unique().tolist()[0] for tensor in taken if len(tensor.unique()) == 1}
            assert counts <= {1, tp}
            assert all(len(tensor.unique()) == 1 for tensor in taken), entry.megatron


@pytest.mark.parametrize("name", CASES)
def test_random_weights_start_as_a_new_model_does(name: str, payload: dict[str, Any]) -> None:
    architecture = read_architecture(payload["directories"][name])
    source = RandomSource(architecture, seed=2)
    for key in source.names():
        values = source.read(key, tuple(slice(0, size) for size in source.shape(key)))
        if key.endswith("bias"):
            assert (values == 0).all()
        elif "norm" in key or ".ln_" in key:
            assert (values == (0 if architecture.zero_centered_norm else 1)).all()
        else:
            assert 0.005 < values.std() < 0.04


def test_one_query_group_is_not_shared_by_two_ranks(payload: dict[str, Any]) -> None:
    weights = weight_map(read_architecture(payload["directories"]["gemma_one_group"]))
    with pytest.raises(ValueError, match=r"tensor_model_parallel_size=2 does not divide the model's query groups"):
        weights.entries["decoder.layers.0.self_attention.linear_qkv.weight"].local_shape(Cut(0, 2, 144))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma", {"architectures": ["Gemma2ForCausalLM"]}, "Gemma 2 is not supported: .*soft-capped attention scores"),
        (
            "gemma",
            {"architectures": ["GemmaForTokens"]},
            "supported: LlamaForCausalLM, Mistral.*Gemma.*GPT2LMHeadModel",
        ),
        ("gemma", {"hidden_act": "silu"}, "hidden_act='silu'; in gemma models it is 'gelu_pytorch_tanh' or 'gelu'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true, which is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true, which is not supported for qwen3"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types=.*do not belong together"),
        ("qwen3", {"layer_types": ["chunked_attention", "full_attention"]}, "layer_types=.*do not belong together"),
        ("qwen2", {"use_sliding_window": False}, "layer_types=.*do not belong together"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types=.*do not belong together"),
        ("mistral", {"hidden_size": None}, "lacks 'hidden_size', which every mistral model has"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=false"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("gpt2", {"n_head": None}, "lacks 'n_head', which every gpt2 model has"),
    ],
)
def test_unsupported_configurations_get_one_sentence(
    name: str, changes: dict[str, Any], message: str, payload: dict[str, Any]
) -> None:
    config = json.loads((Path(payload["directories"][name]) / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=message):
        architecture_of({key: value for key, value in config.items() if value is not None})


def test_windows_and_defaults_are_read_as_transformers_reads_them() -> None:
    minimal = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 30, "intermediate_size": 8}
    minimal |= {"vocab_size": 9, "num_key_value_heads": 2}

    def read(name: str, **changes: Any) -> Architecture:
        return architecture_of({"architectures": [f"{name}ForCausalLM"], **minimal, **changes})

    assert read("Mistral").windowed_layers == tuple(range(30))
    assert read("Mistral").sliding_window == 4096
    assert read("Mistral", sliding_window=None).windowed_layers == ()
    assert read("Qwen2", sliding_window=8).sliding_window is None
    assert read("Qwen2", sliding_window=8, use_sliding_window=True).windowed_layers == (28, 29)
    assert read("Qwen3", use_sliding_window=True, max_window_layers=29).windowed_layers == (29,)
    assert (read("Qwen2").kv_channels, read("Qwen3").kv_channels, read("Gemma").kv_channels) == (16, 128, 256)
    assert read("Gemma").tie_embeddings
    assert not read("Qwen2").tie_embeddings


def test_the_guide_shows_a_real_family() -> None:
    root = Path(__file__).resolve().parent.parent
    family = (root / "nemo_rlhf" / "convert" / "qwen2.py").read_text()
    assert f"```python\n{family}```" in (root / "docs" / "adding_a_model.md").read_text()
