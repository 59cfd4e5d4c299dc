"""Models as people bring them: told twice, half tied, wrapped, damaged or under links; and what conversion leaves."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.cli import main
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.convert import export_hf, import_hf, inspect, verify
from nemo_rlhf.convert.families import architecture_of
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.convert.source import open_hf
from nemo_rlhf.convert.token_ids import check_ids, open_tokenizer
from tests.conftest import LETTERS, write_model_config, write_tokenizer

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 131,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small model with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("brought") / "hf"
    write_model_config(directory, write_tokenizer(directory))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
    write_tokenizer(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return directory


@pytest.fixture
def copy(hf: Path, tmp_path: Path) -> Path:
    return shutil.copytree(hf, tmp_path / "hf")


def edit(file: Path, **changes: Any) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != "gone"}))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence with which ``nemo-rlhf convert`` refuses."""
    assert main(["convert", *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nemo-rlhf: error")]
    assert len(lines) == 1
    return lines[0]


# Tied and untied


def logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(torch.arange(20)[None]).logits


@pytest.mark.parametrize("difference", [0.0, 1e-3])
@pytest.mark.parametrize("binary", [False, True])
def test_a_head_is_tied_where_it_is_the_embedding(difference: float, binary: bool, copy: Path, tmp_path: Path) -> None:
    edit(copy / "config.json", tie_word_embeddings=True)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += difference  # the last that is looked at
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    if binary:
        torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
        (copy / "model.safetensors").unlink()
    import_hf(copy, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    is_tied = difference == 0
    assert read_architecture(copy).tie_embeddings is Architecture.load(tmp_path / "ckpt").tie_embeddings is is_tied
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in load_file(tmp_path / "back" / "model.safetensors")) is not is_tied
    assert torch.equal(logits(copy), logits(tmp_path / "back"))
    (found,) = verify(copy, tmp_path / "ckpt")
    assert found.first_diverging is None and found.top1 == 1.0


@pytest.mark.parametrize("is_pointer", [False, True])
def test_an_architecture_needs_no_weights(is_pointer: bool, copy: Path) -> None:
    """Not of one that is tied, either: whoever loads them says what is missing."""
    edit(copy / "config.json", tie_word_embeddings=True)
    (copy / "model.safetensors").unlink()
    names = {"model.embed_tokens.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for file in names.values() if is_pointer else ():
        (copy / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert read_architecture(copy).tie_embeddings
    with pytest.raises(ValueError, match="LFS" if is_pointer else r"model-1\.safetensors is missing, although"):
        open_hf(copy)


# Facts told twice


def rope(**fields: Any) -> dict[str, Any]:
    return architecture_of({**LLAMA, **fields}).rope


def test_what_is_told_twice_alike_is_read_as_transformers_does() -> None:
    from transformers import GPT2Config, LlamaConfig

    linear = {"rope_type": "linear", "factor": 2.0}
    for fields in (
        {"rope_scaling": linear, "rope_theta": 5e5},
        {"rope_scaling": linear, "rope_theta": 5e5, "rope_parameters": {**linear, "rope_theta": 500000}},
        {"rope_scaling": {"type": "linear", **linear}, "rope_theta": 5e5},
        {"rope_scaling": None, "rope_parameters": {**linear, "rope_theta": 5e5}},
        {"rope_scaling": {}, "rope_parameters": {**linear, "rope_theta": 5e5}, "rope_theta": 5e5},
    ):
        theirs = LlamaConfig(**{**SIZES, **json.loads(json.dumps(fields))}).rope_parameters
        theirs.pop("type", None)
        assert rope(**fields) == theirs == {**linear, "rope_theta": 5e5}, fields
    assert architecture_of({**LLAMA, "dtype": "bfloat16", "torch_dtype": "bfloat16"}).dtype == "bfloat16"
    by_alias = {**GPT2, "hidden_size": 32, "num_hidden_layers": 2}
    assert architecture_of(by_alias).hidden_size == GPT2Config(**by_alias).n_embd
    only_alias = {k: v for k, v in by_alias.items() if k not in ("n_embd", "n_layer")}
    assert architecture_of(only_alias).num_layers == GPT2Config(**only_alias).n_layer == 2


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            ("rope_scaling={'type': 'linear', 'factor': 2.0}", "rope_parameters={'rope_type': 'default'}"),
        ),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, ("rope_type='yarn'",)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e6}, ("1000000.0", "10000.0")),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, ("type='linear'", "'default'")),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("full_attention",)),
        ({"partial_rotary_factor": 0.5}, ("a part of each head", "0.5")),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, ("dtype='float32'", "torch_dtype='bfloat16'")),
        ({"model_type": "qwen2"}, ("model_type='qwen2'", "LlamaForCausalLM")),
        (
            {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}, "num_labels": 2},
            ("num_labels=2", "1 labels"),
        ),
        ({**GPT2, "hidden_size": 64}, ("hidden_size=64", "n_embd=32")),
        ({**GPT2, "num_hidden_layers": 3}, ("num_hidden_layers=3", "n_layer=2")),
        ({"num_key_value_heads": 3}, ("num_attention_heads=4", "num_key_value_heads=3")),
        ({"hidden_size": 34}, ("hidden_size=34", "4 attention heads")),
    ],
)
def test_contradictions_are_refused_with_both_values(fields: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"^config\.json ") as caught:
        architecture_of({**LLAMA, **fields})
    for part in named:
        assert part in str(caught.value)


def test_one_label_is_told_in_two_ways() -> None:
    classifier = {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}
    assert architecture_of({**classifier, "num_labels": 1}).heads == ("value",)
    assert architecture_of({**classifier, "id2label": {"0": "score"}, "num_labels": 1}).heads == ("value",)


# Damaged descriptions


@pytest.mark.usefixtures("outside_of_any_job")
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "holds a list"),
        ("null", "holds null"),
        ("7", "holds a number"),
        ("", "is not JSON"),
        ("{'a': 1}", "is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        (LFS, "git lfs pull"),
        ('{"hidden_size": 1, "hidden_size": 2}', "names 'hidden_size' twice"),
        ({"architectures": 7}, "architectures=7, which must be a list of names"),
        ({"architectures": [7]}, "which must be a list of names"),
        ({"hidden_size": None}, "hidden_size=null, which must be a whole number"),
        ({"hidden_size": "256; rm"}, "hidden_size='256; rm', which must be a whole number"),
        ({"hidden_size": 32.0}, "hidden_size=32.0, which must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0, which must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=true"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"num_hidden_layers": 10**9}, "which no model has"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small', which must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes', which must be true or false"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\], which must be an object"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"hidden_act": ["silu"]}, "hidden_act="),
    ],
)
def test_a_damaged_config_names_file_and_field(
    content: Any, says: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(content, dict):
        edit(copy / "config.json", **content)
    else:
        (copy / "config.json").write_text(content)
    for command in (("inspect", copy), ("import", copy, tmp_path / "ckpt")):
        with pytest.raises(ValueError, match=says):
            raise ValueError(refused(capsys, *command))
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("MixtralForCausalLM", {"num_local_experts": 10**9, "num_experts_per_tok": 2}, "which no model has"),
        ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts": 8}, "num_experts=8"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": 3, "num_experts": 8}, "mlp_only_layers=3"),
        ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("Qwen2ForCausalLM", {"layer_types": "full_attention"}, "layer_types='full_attention'"),
        ("Qwen2ForCausalLM", {"use_sliding_window": "no"}, "use_sliding_window='no'"),
        ("MistralForCausalLM", {"sliding_window": "big"}, "sliding_window='big'"),
    ],
)
def test_fields_of_families_are_checked(family: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        architecture_of({**SIZES, "architectures": [family], **fields})


@pytest.mark.usefixtures("outside_of_any_job")
@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 10**9},
        {"num_layers": "two"},
        {"num_experts": 10**9},
        {"hidden_size": None},
        {"heads": 7},
        {"windowed_layers": ["a"]},
        {"rope": [1]},
        {"more": 1},
    ],
)
def test_a_damaged_model_config_gets_one_sentence(
    change: dict[str, Any], hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    import_hf(hf, tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "model_config.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **change}))
    assert "does not describe a model" in refused(capsys, "inspect", tmp_path / "ckpt")


@pytest.mark.parametrize("content", ["- 1\n", "[" * 50_000, "a: [\n", "", LFS])
def test_a_file_that_is_no_model_config_gets_one_sentence(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_config.yaml").write_text(content)
    words = "git lfs pull" if content == LFS else "does not describe a model"
    assert words in refused(capsys, "inspect", tmp_path)


def test_no_model_is_built_of_what_its_weights_do_not_bear_out(copy: Path) -> None:
    class Built:
        role, heads = "policy", ()

        def __init__(self, *_: Any) -> None:
            raise AssertionError("it was built")

    edit(copy / "config.json", hidden_size=1 << 40)
    with pytest.raises(ValueError, match=r"has shape .*, but config.json says .*1099511627776"):
        open_role(Built, ModelConfig(restore_from=str(copy)), str(copy), "32", 0)  # type: ignore[type-var]


# What is no model, or one in wrappings


@pytest.mark.parametrize(
    ("prefix", "says"),
    [
        ("base_model.model.", "PEFT"),
        ("_orig_mod.", "torch.compile"),
        ("module.", "DistributedDataParallel"),
        ("module._orig_mod.", "begin with 'module._orig_mod.'"),
        ("language_model.", "images and text"),
        ("_forward_module.", "Lightning"),
        ("policy.", "begin with 'policy.'"),
    ],
)
def test_wrapped_weights_are_told(
    prefix: str, says: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, copy / "model.safetensors")
    assert says in refused(capsys, "import", copy, tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("renamed", "says"),
    [
        (lambda name: name.replace("model.", "model.language_model.", 1), "images and text"),
        (lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"), "LoRA adapter that is not merged"),
        (lambda name: name.replace("_proj.weight", "_proj.qweight"), "quantised"),
    ],
)
def test_other_writers_names_are_told(
    renamed: Any, says: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, copy / "model.safetensors")
    assert says in refused(capsys, "import", copy, tmp_path / "ckpt")


@pytest.mark.usefixtures("outside_of_any_job")
def test_adapters_are_told(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}')
    line = refused(capsys, "import", tmp_path / "peft", tmp_path / "ckpt")
    assert "PEFT adapter (adapter_config.json) of meta-llama/Llama-3.1-8B" in line and "merge_and_unload" in line
    assert "PEFT adapter" in refused(capsys, "inspect", tmp_path)  # a directory of adapters
    (copy / "adapter_model.safetensors").write_bytes(b"")
    assert "PEFT adapter (adapter_model.safetensors)" in refused(capsys, "inspect", copy)
    (copy / "adapter_model.safetensors").rename(copy / "adapter_config.json")
    assert "adapter_config.json is not JSON" in refused(capsys, "inspect", copy)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_git_lfs_pointers_are_told(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "model.safetensors").unlink()
    (copy / name).write_text(LFS)
    line = refused(capsys, "inspect", copy)
    assert f"{copy / name} is only a git-LFS pointer" in line and "git lfs pull" in line


@pytest.mark.usefixtures("outside_of_any_job")
def test_git_lfs_pointers_in_checkpoints_are_told(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_hf(hf, tmp_path / "ckpt")
    for name in ("__0_0.distcp", ".metadata"):
        (tmp_path / "ckpt" / "weights" / name).write_text(LFS)
        assert f"{name} is only a git-LFS pointer" in refused(capsys, "inspect", tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "names '../outside.safetensors'"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names '/etc/passwd'"),
        ({"weight_map": {"a": "config.json"}}, "which is no weight file"),
        ({"weight_map": {"a": 7}}, "is not an index"),
        ({"weight_map": []}, "is not an index"),
        ({}, "is not an index"),
        ([], "holds a list"),
    ],
)
def test_an_index_leads_nowhere_else(index: Any, says: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move(copy / "model.safetensors", copy.parent / "outside.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert says in refused(capsys, "inspect", copy)


# Links


@pytest.mark.usefixtures("outside_of_any_job")
def test_links_to_other_things_are_not_copied(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "id_rsa").write_text("SECRET KEY")
    (copy / "tokenizer_extra.json").symlink_to(tmp_path / "id_rsa")
    assert "which is not of this model" in refused(capsys, "import", copy, tmp_path / "ckpt")
    (copy / "tokenizer_extra.json").unlink()
    (tmp_path / "keys").mkdir()
    (tmp_path / "id_rsa").rename(tmp_path / "keys" / "id_rsa")
    (copy / "additional_chat_templates").symlink_to(tmp_path / "keys")
    assert "which is not of this model" in refused(capsys, "import", copy, tmp_path / "ckpt")
    assert not any("SECRET" in file.read_text(errors="ignore") for file in tmp_path.glob("ckpt/**/*") if file.is_file())


def test_models_laid_together_by_links_are_copied(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0f1e", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(hf.iterdir())):
        (tmp_path / "linked" / file.name).symlink_to(file)
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(blobs / str(number))
    for origin in (tmp_path / "linked", snapshot):
        target = import_hf(origin, tmp_path / f"{origin.name}_ckpt")
        assert (target / "tokenizer" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


# Targets


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": '{"name": "site"}', "src/thesis.tex": "years"}, "something else than a model"),
        ({"config.json": "[]", "thesis.tex": "years"}, "something else than a model"),
        ({"config.json": '{"architectures": ["A"]}', ".git/HEAD": "ref"}, "holds .git"),
        ({"config.json": '{"architectures": ["A"]}', "README.md": "mine"}, "holds README.md"),
        ({"model_config.yaml": "a: 1", "weights/notes.txt": "mine"}, "holds weights/notes.txt"),
        ({"model_config.yaml": "a: 1", "tokenizer/deep/tokenizer.json": "mine"}, "holds tokenizer/deep"),
        ({"policy/model_config.yaml": "a: 1", "state.pt": "x"}, "something else than a model"),
    ],
)
def test_force_replaces_models_only(
    files: dict[str, str], says: str, hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(content)
    assert says in refused(capsys, "import", hf, target, "--force")
    assert {name: (target / name).read_text() for name in files} == files
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.usefixtures("outside_of_any_job")
def test_force_never_touches_its_source(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = import_hf(copy, tmp_path / "ckpt")
    (tmp_path / "outer").mkdir()
    inner = shutil.copytree(ckpt, tmp_path / "outer" / "inner")
    shutil.copy(copy / "config.json", tmp_path / "outer")
    (tmp_path / "link").symlink_to(ckpt)
    before = sorted(path for path in tmp_path.rglob("*"))
    for source, target in ((ckpt, ckpt), (inner, inner / "new"), (inner, tmp_path / "outer"), (inner, ckpt / "..")):
        assert "lie in each other" in refused(capsys, "export", source, target, "--force")
    assert "lie in each other" in refused(capsys, "import", copy, copy / "ckpt")
    assert "is a link to" in refused(capsys, "import", copy, tmp_path / "link", "--force")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert "is a link to" in refused(capsys, "import", copy, tmp_path / "nowhere", "--force")
    (tmp_path / "nowhere").unlink()
    monkeypatch.chdir(ckpt)
    assert "is where this command runs" in refused(capsys, "import", copy, ".", "--force")
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_force_replaces_what_conversion_made(copy: Path, tmp_path: Path) -> None:
    edit(copy / "config.json", bos_token_id=1)
    (copy / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    for _ in range(2):
        import_hf(copy, tmp_path / "ckpt", force=True)
        export_hf(tmp_path / "ckpt", tmp_path / "back", max_shard_size="8KB", force=True)
    (tmp_path / ".ckpt.replaced").write_text("of an earlier attempt")
    import_hf(copy, tmp_path / "ckpt", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "ckpt", "back"}


# Tokens


def with_tokenizer(ckpt: Path, **changes: Any) -> None:
    edit(ckpt / "tokenizer" / "tokenizer_config.json", **changes)


@pytest.mark.parametrize(
    ("before", "generation", "after", "generation_after"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 5}, {"eos_token_id": 1}, {"eos_token_id": 1, "pad_token_id": 0}),
        ({"eos_token_id": [5, 1]}, {"eos_token_id": [9, 1]}, {"eos_token_id": [5, 1]}, {"eos_token_id": [9, 1]}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": [5, 6]}, {"eos_token_id": 1}, {"eos_token_id": 1}),
        ({"eos_token_id": None}, {"temperature": 0.7}, {"eos_token_id": 1}, {"eos_token_id": 1, "temperature": 0.7}),
        ({"pad_token_id": 7}, {"pad_token_id": 7}, {"pad_token_id": 0}, {"pad_token_id": 0}),
        ({"bos_token_id": 9}, {"bos_token_id": 9}, {"bos_token_id": None}, {"bos_token_id": None}),
        ({"bos_token_id": 1}, {"bos_token_id": 1}, {"bos_token_id": 1}, {"bos_token_id": 1}),
    ],
)
def test_exported_special_tokens_are_the_tokenizer_s(
    before: dict[str, Any],
    generation: dict[str, Any],
    after: dict[str, Any],
    generation_after: dict[str, Any],
    copy: Path,
    tmp_path: Path,
) -> None:
    edit(copy / "config.json", **before)
    (copy / "generation_config.json").write_text(json.dumps(generation))
    import_hf(copy, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    found = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: found[key] for key in after} == after
    found = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert {key: found[key] for key in generation_after} == generation_after


def test_another_tokenizer_s_end_is_exported(copy: Path, tmp_path: Path) -> None:
    import_hf(copy, tmp_path / "ckpt")
    with_tokenizer(tmp_path / "ckpt", eos_token=".")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["eos_token_id"] == open_tokenizer(tmp_path / "back").eos_token_id != 1


def test_a_config_that_says_the_same_keeps_its_bytes(copy: Path, tmp_path: Path) -> None:
    import_hf(copy, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (copy / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("config.json", {"eos_token_id": 30}, "config.json sets eos_token_id to 30"),
        ("config.json", {"eos_token_id": [1, 99]}, "config.json sets eos_token_id to 99"),
        ("config.json", {"pad_token_id": "x"}, "config.json sets pad_token_id to 'x'"),
        ("generation_config.json", {"bos_token_id": 31}, "generation_config.json sets bos_token_id to 31"),
    ],
)
def test_ids_beyond_the_vocabulary_are_found(name: str, changes: dict[str, Any], says: str, copy: Path) -> None:
    (copy / "generation_config.json").write_text("{}")
    edit(copy / "config.json", pad_token_id=-1)  # as many have it, for none
    tokenizer = open_tokenizer(copy)
    check_ids(tokenizer, copy, 30, copy)
    edit(copy / name, **changes)
    with pytest.raises(ValueError, match=says):
        check_ids(tokenizer, copy, 30, copy)


def test_a_tokenizer_with_gaps_is_not_taken_for_small(copy: Path) -> None:
    described = json.loads((copy / "tokenizer.json").read_text())
    described["model"]["vocab"]["z"] = 70
    (copy / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"gives 'z' the id 70, but .* has a vocabulary of 60"):
        check_ids(open_tokenizer(copy), copy, 60, copy)
    write_tokenizer(copy, LETTERS + "0123456789")
    with pytest.raises(ValueError, match="has 40 tokens, but"):
        check_ids(open_tokenizer(copy), copy, 30, copy)


@pytest.mark.usefixtures("outside_of_any_job")
def test_a_tokenizer_s_own_code_is_neither_asked_for_nor_run(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code = f"open({str(tmp_path / 'EXECUTED')!r}, 'w')\nclass Own: pass\n"
    (copy / "tokenization_own.py").write_text(code)
    own = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "Own"}
    edit(copy / "tokenizer_config.json", **own)
    edit(copy / "config.json", auto_map={"AutoConfig": "tokenization_own.Own"})
    import_hf(copy, tmp_path / "ckpt")
    with pytest.warns(UserWarning, match="cannot be read"):
        export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert "the tokenizer in" in refused(capsys, "inspect", copy)
    assert "the tokenizer in" in refused(capsys, "inspect", tmp_path / "ckpt")
    assert not (tmp_path / "EXECUTED").exists()


def test_inspect_says_what_it_did(hf: Path, tmp_path: Path) -> None:
    ckpt = import_hf(hf, tmp_path / "ckpt")
    assert inspect(hf)["fingerprint"] == inspect(ckpt)["fingerprint"]
    assert os.path.samefile(inspect(ckpt)["path"], ckpt)
