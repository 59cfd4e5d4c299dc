"""``convert verify`` and ``convert inspect``: what they say of models that agree, that differ, and that are none."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemo_rlhf.cli import main
from nemo_rlhf.convert import import_hf, inspect, verify
from tests.conftest import write_model_config, write_tokenizer


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = tmp_path_factory.mktemp("models") / "hf"
    write_model_config(directory, write_tokenizer(directory), num_hidden_layers=3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def ckpt_dir(hf_dir: Path) -> Path:
    return import_hf(hf_dir, hf_dir.with_name("ckpt"))


def changed(hf_dir: Path, target: Path, tensor: str, factor: float) -> Path:
    """A copy of the model in which one tensor is multiplied."""
    shutil.copytree(hf_dir, target)
    tensors = load_file(hf_dir / "model.safetensors")
    tensors[tensor] = tensors[tensor] * factor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_same_model_agrees(hf_dir: Path, ckpt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = verify(hf_dir, ckpt_dir)
    assert found.first_diverging is None and found.max_abs_difference < 1e-4 and found.num_tokens == 4 * 48
    assert found.top1 == 1.0 and found.cosine == pytest.approx(1.0, abs=1e-5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["convert", "verify", str(hf_dir), str(ckpt_dir)]) == 0
    assert not [one for one in caught if "full scope" in str(one.message)]
    assert re.fullmatch(r"float32: 192 tokens, .* top-1 agreement 100.0%: agree\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("tensor", "factor", "part"),
    [
        ("model.embed_tokens.weight", 1.01, "the embedding"),
        ("model.layers.1.mlp.up_proj.weight", 1.5, "layer 1"),
        ("model.layers.2.self_attn.v_proj.weight", -1.0, "layer 2"),
        ("model.norm.weight", 1.01, "the output layer or final norm"),
        ("lm_head.weight", float("nan"), "the output layer or final norm"),
    ],
)
def test_the_first_part_that_differs_is_named(
    hf_dir: Path,
    ckpt_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tensor: str,
    factor: float,
    part: str,
) -> None:
    other = changed(hf_dir, tmp_path / "other", tensor, factor)
    assert main(["convert", "verify", str(other), str(ckpt_dir)]) == 1
    assert capsys.readouterr().out.endswith(f"DISAGREE, first in {part}\n")


def test_prompts_can_be_given(hf_dir: Path, ckpt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "stone"}\n{"text": "river bed"}\n')
    command = ["convert", "verify", str(hf_dir), str(ckpt_dir), "--prompts", str(tmp_path / "prompts.jsonl")]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("float32: 14 tokens")
    with pytest.raises(ValueError, match="'' has no tokens"):
        verify(hf_dir, ckpt_dir, [""])


def test_other_models_are_refused(hf_dir: Path, ckpt_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is of the other format: give HF_DIR, then CKPT_DIR"):
        verify(ckpt_dir, hf_dir)
    shutil.copytree(hf_dir, tmp_path / "other")
    write_model_config(tmp_path / "other", 30, num_hidden_layers=2)
    with pytest.raises(ValueError, match="are different models: num_layers is 3 and 2"):
        verify(tmp_path / "other", ckpt_dir)


def test_inspect_says_what_is_there(hf_dir: Path, ckpt_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["convert", "inspect", str(ckpt_dir)]) == 0
    said = yaml.safe_load(capsys.readouterr().out)
    assert said == inspect(ckpt_dir)
    assert (said["format"], said["family"], said["heads"]) == ("Megatron", "llama", ["language model"])
    assert (said["num_layers"], said["hidden_size"], said["dtype"], said["step"]) == (3, 32, "float32", None)
    assert said["parameters"] == AutoModelForCausalLM.from_pretrained(hf_dir).num_parameters()
    assert said["tokenizer"]["tokens"] == 30 and said["tokenizer"]["eos_token"] == "<eos>"
    of_hf = inspect(hf_dir)
    assert of_hf["format"] == "Hugging Face"
    assert {key: of_hf[key] for key in said if key not in ("path", "format", "bytes")} == {
        key: said[key] for key in said if key not in ("path", "format", "bytes")
    }


def test_the_fingerprint_tells_models_and_vocabularies_apart(hf_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, letters, sizes in (
        ("tokens", "zyxwvutsrqponmlkjihgfedcba .", {}),
        ("shape", None, {"intermediate_size": 48}),
    ):
        directory = tmp_path / name
        size = write_tokenizer(directory, letters) if letters else write_tokenizer(directory)
        write_model_config(directory, size, **{"num_hidden_layers": 3, **sizes})
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
    found = {inspect(path)["fingerprint"] for path in (hf_dir, tmp_path / "tokens", tmp_path / "shape")}
    assert len(found) == 3


def test_inspect_refuses_what_is_damaged(ckpt_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ckpt_dir, tmp_path / "ckpt")
    config = tmp_path / "ckpt" / "model_config.yaml"
    config.write_text(config.read_text().replace("ffn_hidden_size: 64", "ffn_hidden_size: 32"))
    assert main(["convert", "inspect", str(tmp_path / "ckpt")]) == 2
    assert "has shape" in capsys.readouterr().err
    assert main(["convert", "inspect", str(tmp_path)]) == 2
    assert "is neither a Hugging Face directory" in capsys.readouterr().err
