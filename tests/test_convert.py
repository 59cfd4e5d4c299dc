"""Conversion between Hugging Face and Megatron: same logits, the same bits back, and every tensor accounted for."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert.checkpoint import CheckpointSource
from nemo_rlhf.convert.families import architecture_of, weight_map
from nemo_rlhf.convert.load import init_heads
from nemo_rlhf.convert.locate import read_architecture, resolve_restore_from
from nemo_rlhf.convert.mapping import Cut, whole
from nemo_rlhf.convert.source import RandomSource, normal, open_hf
from nemo_rlhf.convert.transfer import export_hf, import_hf, parse_size
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.gpt import build_gpt, padded_vocab_size
from tests.spawn import run_distributed

WORKER = "tests.workers.convert_worker:run"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "tied_llama3_grouped": {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "untied_default_ungrouped": {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}},
    "wide_heads_linear": {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
}
TOKENS = torch.randint(0, 131, (2, 48), generator=torch.Generator().manual_seed(3))


def make_hf(directory: Path, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **changes: Any) -> Path:
    """A tiny Llama with weights large enough that every detail shows, written by transformers itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-4,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.2 * noise)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


@torch.no_grad()
def reference_logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()(TOKENS).logits


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {name: make_hf(root / name, **changes) for name, changes in CASES.items()}


@pytest.fixture(scope="module")
def one_rank(hf_dirs: dict[str, Path]) -> dict[str, Any]:
    """What one process computes, for every case."""
    from tests.workers import convert_worker

    state.set_environment_for_one_process()
    directories = {name: str(path) for name, path in hf_dirs.items()}
    return convert_worker.run({"tp": 1, "pp": 1, "tokens": TOKENS, "directories": directories, "save": None})


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, hf_dirs: dict[str, Path], one_rank: dict[str, Any]) -> None:
    expected = reference_logits(hf_dirs[case])
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(one_rank[case], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_every_cut_gives_the_same_model(
    tp: int, pp: int, hf_dirs: dict[str, Path], one_rank: dict[str, Any], tmp_path: Path
) -> None:
    directories = {name: str(path) for name, path in hf_dirs.items()}
    save = str(tmp_path) if (tp, pp) == (2, 2) else None
    payload = {"tp": tp, "pp": pp, "tokens": TOKENS, "directories": directories, "save": save}
    results = run_distributed(WORKER, tp * pp, payload)
    for rank in range((pp - 1) * tp, pp * tp):  # the ranks of the last stage
        for name, expected in one_rank.items():
            torch.testing.assert_close(results[rank][name], expected, atol=2e-5, rtol=0, msg=f"{name} on rank {rank}")
    if save:
        for name, directory in hf_dirs.items():  # what four ranks wrote comes out of one process, bit for bit
            assert_same_weights(directory, export_hf(tmp_path / name, tmp_path / f"{name}-hf"))


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = open_hf(first), open_hf(second)
    assert set(a.names()) == set(b.names())
    for name in a.names():
        x, y = (source.read(name, whole(source.shape(name))) for source in (a, b))
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


@pytest.mark.parametrize(
    ("dtype", "shards", "case"),
    [
        (torch.float32, "1GB", "untied_default_ungrouped"),
        (torch.bfloat16, "20KB", "tied_llama3_grouped"),
        (torch.float16, "1GB", "wide_heads_linear"),
    ],
)
def test_round_trip_is_bit_exact(
    dtype: torch.dtype, shards: str, case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    origin = make_hf(tmp_path / "origin", dtype, shards, **CASES[case])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (origin / name).write_bytes(f"bytes of {name} \r\n".encode())
    import_hf(origin, tmp_path / "ckpt")
    result = export_hf(tmp_path / "ckpt", tmp_path / "result", shards)

    assert_same_weights(origin, result)
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    for name in names:
        assert (result / name).read_bytes() == (origin / name).read_bytes(), name
    assert len(list(result.glob("*.safetensors"))) == (1 if shards == "1GB" else len(list(result.glob("model-*"))))
    assert (shards == "1GB") == (result / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))
    for name in names[2:]:  # not real ones
        (result / name).unlink()
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(result, output_loading_info=True)
    assert model.dtype == dtype
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_checkpoint_source_reads_boxes(tmp_path: Path, hf_dirs: dict[str, Path]) -> None:
    path = hf_dirs["tied_llama3_grouped"]
    import_hf(path, tmp_path / "ckpt")
    assert resolve_restore_from(tmp_path / "ckpt") == ("megatron", tmp_path / "ckpt")
    source, origin = CheckpointSource(tmp_path / "ckpt", read_architecture(tmp_path / "ckpt")), open_hf(path)
    for part in ("layers.1.self_attn.q_proj", "layers.0.mlp.up_proj", "embed_tokens"):
        name = f"model.{part}.weight"
        box = (slice(5, 23), slice(7, 30))  # across query groups
        assert torch.equal(source.read(name, box), origin.read(name, box)), name


def test_training_checkpoint_stands_for_its_policy(tmp_path: Path, hf_dirs: dict[str, Path]) -> None:
    architecture = read_architecture(hf_dirs["untied_default_ungrouped"])
    for role in ("policy", "critic"):
        (tmp_path / "step_3" / role).mkdir(parents=True)
        architecture.save(tmp_path / "step_3" / role)
    assert resolve_restore_from(tmp_path / "step_3") == ("megatron", tmp_path / "step_3" / "policy")
    assert read_architecture(tmp_path / "step_3") == architecture
    assert resolve_restore_from(tmp_path / "step_3" / "critic") == ("megatron", tmp_path / "step_3" / "critic")


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_every_element_has_exactly_one_place(tp: int, tied: bool) -> None:
    """Over all ranks a row's pieces take each element of its tensors once, and no place of a shard twice."""
    weights = weight_map(architecture_of(hf_config(tie_word_embeddings=tied, num_key_value_heads=4)))
    for name, entry in weights.entries.items():
        taken = [torch.zeros(shape) for shape in entry.shapes]
        for rank in range(tp):
            cut = Cut(rank, tp, padded_vocab_size(131, tp))
            placed = torch.zeros(entry.local_shape(cut))
            for piece in entry.pieces(cut):
                assert taken[piece.tensor][piece.outside].shape == placed[piece.inside].shape
                taken[piece.tensor][piece.outside] += 1
                placed[piece.inside] += 1
            padded = "word_embeddings" in name or "output_layer" in name
            assert (placed == 1).all() or (padded and placed.max() <= 1), name
        replicated = entry.shapes[0] == (32,)
        assert all((tensor == (tp if replicated else 1)).all() for tensor in taken), name


def hf_config(**changes: Any) -> dict[str, Any]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 131,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def test_rope_fields_old_and_new_read_alike() -> None:
    factors = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    new = architecture_of(hf_config(rope_parameters=LLAMA3)).rope
    assert new == LLAMA3
    assert architecture_of(hf_config(rope_theta=500000.0, rope_scaling=factors)).rope == new
    assert architecture_of(hf_config(rope_theta=500.0)).rope == {"rope_type": "default", "rope_theta": 500.0}
    old = architecture_of(hf_config(rope_scaling={"type": "linear", "factor": 2.0})).rope
    assert old == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def test_parameter_count_equals_that_of_transformers(hf_dirs: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    for directory in hf_dirs.values():
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert weight_map(read_architecture(directory)).num_parameters() == model.num_parameters()


def test_random_weights() -> None:
    architecture = architecture_of(hf_config(hidden_size=128, intermediate_size=256, num_hidden_layers=8))
    source, again, other = (RandomSource(architecture, seed) for seed in (3, 3, 4))
    deviations = {"embed_tokens": 0.02, "layers.0.mlp.up_proj": 0.02, "layers.0.self_attn.o_proj": 0.02 / math.sqrt(16)}
    for part, deviation in deviations.items():
        name = f"model.{part}.weight"
        box = whole(source.shape(name))
        assert source.read(name, box).std().item() == pytest.approx(deviation, rel=0.03)
        assert torch.equal(source.read(name, box), again.read(name, box))
        assert not torch.equal(source.read(name, box), other.read(name, box))
    first, second = (source.read(f"model.layers.{i}.mlp.up_proj.weight", (slice(9), slice(9))) for i in (0, 1))
    assert not torch.equal(first, second)
    assert (source.read("model.norm.weight", (slice(0, 128),)) == 1).all()


def rewrite(directory: Path, target: Path, change: Any) -> Path:
    """A copy of ``directory`` whose tensors went through ``change``."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lacks lm_head.weight"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48)}),
            "has model.layers.0.mlp.up_proj.bias",
        ),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(48, 32)}), "has model.layers.2.mlp.up_pr"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"tensor model.norm.weight has shape \[31\], but config.json says \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}),
            "model.norm.weight is stored as I64",
        ),
    ],
)
def test_wrong_tensors_are_named(change: Any, message: str, tmp_path: Path, hf_dirs: dict[str, Path]) -> None:
    path = rewrite(hf_dirs["untied_default_ungrouped"], tmp_path / "hf", change)
    with pytest.raises(ValueError, match=message):
        import_hf(path, tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()
    assert not list(tmp_path.glob(".*"))


def test_harmless_extras_are_accepted(tmp_path: Path, hf_dirs: dict[str, Path]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    origin = hf_dirs["tied_llama3_grouped"]
    import_hf(rewrite(origin, tmp_path / "hf", change), tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    expected, found = (load_file(path / "model.safetensors") for path in (origin, tmp_path / "back"))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_pytorch_bin(tmp_path: Path, hf_dirs: dict[str, Path], one_rank: dict[str, Any]) -> None:
    from tests.workers import convert_worker

    case = "wide_heads_linear"
    shutil.copytree(hf_dirs[case], tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "hf" / "pytorch_model.bin")
    state.initialize(1, 1, seed=1)
    assert torch.equal(convert_worker.logits(convert_worker.load(str(tmp_path / "hf")), TOKENS), one_rank[case])
    torch.save({"model.norm.weight": Path("x")}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds other things than tensors and is refused"):
        open_hf(tmp_path / "hf")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is damaged"):
        open_hf(tmp_path / "hf")


def test_damaged_files_are_named(tmp_path: Path, hf_dirs: dict[str, Path]) -> None:
    shutil.copytree(hf_dirs["wide_heads_linear"], tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        open_hf(tmp_path / "hf")
    file.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        open_hf(tmp_path / "hf")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors is missing"):
        open_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM'.*is not supported; supported: Llama"),
        ({"architectures": None}, "is not supported; supported: LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'low_freq_factor'"),
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn'"),
    ],
)
def test_unsupported_configurations_get_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        architecture_of(hf_config(**changes))
    assert "\n" not in str(error.value)


def test_paths_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a Hugging Face directory"):
        read_architecture(tmp_path)
    with pytest.raises(ValueError, match="There is no directory"):
        read_architecture(tmp_path / "meta-llama" / "Llama-3.1-8B")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_architecture(tmp_path)


def test_transfers_refuse_what_they_cannot_do(tmp_path: Path, hf_dirs: dict[str, Path]) -> None:
    path = hf_dirs["untied_default_ungrouped"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match="taken exists"):
        import_hf(path, tmp_path / "taken")
    import_hf(path, tmp_path / "taken", force=True)
    with pytest.raises(ValueError, match="is a Hugging Face directory already"):
        export_hf(path, tmp_path / "out")
    with pytest.raises(ValueError, match="is a Megatron checkpoint already"):
        import_hf(tmp_path / "taken", tmp_path / "out")
    with pytest.raises(ValueError, match="max_shard_size='large'"):
        export_hf(tmp_path / "taken", tmp_path / "out", "large")
    architecture = Architecture.load(tmp_path / "taken")
    dataclasses.replace(architecture, ffn_hidden_size=64).save(tmp_path / "taken")
    with pytest.raises(ValueError, match=r"mlp.linear_fc1.weight has shape \[2, 96, 32\].* says \[2, 128, 32\]"):
        export_hf(tmp_path / "taken", tmp_path / "out")
    dataclasses.replace(architecture, num_layers=1).save(tmp_path / "taken")
    with pytest.raises(ValueError, match=r"has shape \[2, 32\].* says \[1, 32\]"):
        export_hf(tmp_path / "taken", tmp_path / "out")
    dataclasses.replace(architecture, heads=("value",)).save(tmp_path / "taken")
    with pytest.raises(ValueError, match=r"lacks value_head.weight"):
        export_hf(tmp_path / "taken", tmp_path / "out")
    shutil.rmtree(tmp_path / "taken" / "weights")
    architecture.save(tmp_path / "taken")
    with pytest.raises(ValueError, match="is not a whole checkpoint"):
        export_hf(tmp_path / "taken", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@torch.no_grad()
def test_critic_starts_from_a_language_model(
    tmp_path: Path, hf_dirs: dict[str, Path], one_rank: dict[str, Any]
) -> None:
    """Trunk from either format, with or without an output layer; a fresh head says 0."""
    from transformers import AutoModelForCausalLM

    from tests.workers import convert_worker

    origin = hf_dirs["untied_default_ungrouped"]
    state.initialize(1, 1, seed=1)
    import_hf(origin, tmp_path / "ckpt")
    headless = rewrite(origin, tmp_path / "headless", lambda tensors: tensors.pop("lm_head.weight"))
    for path in (tmp_path / "ckpt", headless):
        assert torch.equal(
            convert_worker.values(str(path), TOKENS, seed=6), one_rank["untied_default_ungrouped/values"]
        )
    model = build_gpt(read_architecture(origin), role="critic")
    init_heads(model, seed=1)
    assert not model.value_head.weight.any()
    head = normal("value_head.weight", 6, (1, 32))[0]
    hidden = AutoModelForCausalLM.from_pretrained(origin)(TOKENS, output_hidden_states=True).hidden_states[-1]
    expected = (hidden @ head).float()
    torch.testing.assert_close(one_rank["untied_default_ungrouped/values"], expected, atol=2e-5, rtol=0)


def test_sizes() -> None:
    assert [parse_size(size) for size in ("5GB", "1.5 MiB", "200kb", 77)] == [5 * 10**9, 1572864, 200000, 77]


def test_a_weight_that_nobody_loaded_shows(hf_dirs: dict[str, Path]) -> None:
    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    model = build_gpt(read_architecture(hf_dirs["untied_default_ungrouped"]))
    assert all(parameter.isnan().all() for parameter in model.parameters())
