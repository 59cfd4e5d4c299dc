"""Whole checkpoints moved between the formats: bounded memory, several processes, and what goes wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_rlhf.cli import main
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert import directory as directories
from nemo_rlhf.convert import export_hf, files, import_hf, to_megatron, transfer
from nemo_rlhf.convert.checkpoint import CheckpointSource
from nemo_rlhf.convert.locate import resolve_restore_from
from nemo_rlhf.convert.safetensors_io import lay_out
from nemo_rlhf.convert.source import open_hf
from nemo_rlhf.files import alone
from nemo_rlhf.parallel import checkpoint, manifest, state
from nemo_rlhf.parallel.gpt import build_gpt
from tests.jobs import error_lines
from tests.spawn import ROOT, run_distributed
from tests.test_convert import CASES, TOKENS, assert_same_weights, make_hf, reference_logits, rewrite


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in fp32."""
    return make_hf(tmp_path_factory.mktemp("transfer") / "hf", **CASES["untied_default_ungrouped"])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in several blocks, chunks and files, as a large model would be. Planned here, so workers obey too."""
    monkeypatch.setattr(files.blocks, "__defaults__", (600,))
    monkeypatch.setattr(to_megatron, "_CHUNK", 1500)
    monkeypatch.setattr(to_megatron, "_FILE", 7000)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but those that name a save by a random number."""
    names = [p for p in directory.rglob("*") if p.is_file() and p.name not in (".metadata", manifest.MANIFEST)]
    return {str(path.relative_to(directory)): path.read_bytes() for path in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_the_same_file(dtype: torch.dtype, tmp_path: Path, small_blocks: None) -> None:
    origin = make_hf(tmp_path / "hf", dtype, **CASES["tied_llama3_grouped"])
    import_hf(origin, tmp_path / "ckpt")
    assert len(list((tmp_path / "ckpt" / "weights").glob("*.distcp"))) > 3
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(origin)


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    dtypes = [torch.float16, torch.float32, torch.bfloat16, torch.float64]
    tensors = {f"ü{n}": torch.randn(3, n % 5 + 1).to(dtypes[n % 4]) for n in range(12)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    header = lay_out(tmp_path / "ours", {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
    with (tmp_path / "ours").open("wb") as file:
        file.write(header.content)
        for name, tensor in tensors.items():
            files.write_at(file.fileno(), header.arrays[name].offset, files.bytes_of(tensor))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert header.size == (tmp_path / "theirs").stat().st_size


def test_several_workers_write_the_same_files(hf: Path, tmp_path: Path, small_blocks: None) -> None:
    for workers in (1, 2):
        import_hf(hf, tmp_path / f"ckpt{workers}", workers=workers)
        export_hf(tmp_path / f"ckpt{workers}", tmp_path / f"hf{workers}", "20KB", workers=workers)
    for kind in ("ckpt", "hf"):
        assert contents(tmp_path / f"{kind}1") == contents(tmp_path / f"{kind}2")
    with pytest.raises(ValueError, match="workers=0 is not"):
        import_hf(hf, tmp_path / "none", workers=0)


def make_other(name: str, path: Path) -> Path:
    """A tiny model of another family, as transformers initialises and writes it."""
    import transformers

    sizes = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more: dict[str, dict[str, Any]] = {
        "Llama": {"intermediate_size": 48, "num_key_value_heads": 2},
        "Qwen2": {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "GPT2": {"n_positions": 64},
        "Mixtral": {"intermediate_size": 48, "num_key_value_heads": 2, "num_local_experts": 4},
        "Qwen3Moe": {
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
        },
    }
    config = getattr(transformers, f"{name}Config")(**sizes, **more[name])
    kind = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2", "Mixtral", "Qwen3Moe"])
def test_weights_are_stored_as_megatron_stores_them(family: str, tmp_path: Path, small_blocks: None) -> None:
    """The same keys, shapes (but for the vocabulary's padding) and dtypes as a model that is built and saved."""
    from nemo_rlhf.convert.load import load_weights, open_source

    origin = make_other(family, tmp_path / "hf")
    import_hf(origin, tmp_path / "ours")
    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    architecture = Architecture.load(tmp_path / "ours")
    model = build_gpt(architecture)
    load_weights(model, open_source(tmp_path / "ours"), architecture)
    (tmp_path / "theirs").mkdir()
    checkpoint.save_model(model, tmp_path / "theirs")

    def described(directory: Path) -> dict[str, Any]:
        metadata = pickle.loads((directory / "weights" / ".metadata").read_bytes()).state_dict_metadata
        # where megatron from 0.19 on keeps what it wrote to common.pt, and where it reads that too
        metadata = {key: value for key, value in metadata.items() if not key.startswith("common_state/")}
        shapes = {key: getattr(value, "size", None) for key, value in metadata.items()}
        padded = {key for key in shapes if key.startswith(("embedding.word_embeddings", "output_layer"))}
        return {
            key: (shape[1:] if key in padded else shape, getattr(metadata[key], "properties", None))
            for key, shape in shapes.items()
        }

    assert described(tmp_path / "ours") == described(tmp_path / "theirs")
    for side in ("ours", "theirs"):
        assert_same_weights(origin, export_hf(tmp_path / side, tmp_path / f"{side}-hf"))
    checkpoint.load_model(model, tmp_path / "ours")


@pytest.mark.parametrize("tied", [True, False])
def test_megatron_core_alone_loads_it(tied: bool, tmp_path: Path, small_blocks: None) -> None:
    changes = {"num_key_value_heads": 2, "tie_word_embeddings": tied}
    origin = make_hf(tmp_path / "hf", **{**CASES["untied_default_ungrouped"], **changes})
    import_hf(origin, tmp_path / "ckpt")
    config = json.loads((origin / "config.json").read_text())
    payload = {
        "checkpoint": str(tmp_path / "ckpt"),
        "config": config,
        "tokens": TOKENS,
        "cuts": [(2, 1), (1, 2)],
    }
    _, last = run_distributed("tests.workers.transfer_worker:run", 2, payload)
    expected = reference_logits(origin)
    for found in last:
        torch.testing.assert_close(found[..., :131], expected, atol=1e-4, rtol=0)


_PEAK = """
import sys
from pathlib import Path
import torch.distributed.checkpoint
from nemo_rlhf.convert import transfer
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
before = peak()
getattr(transfer, sys.argv[1])(*map(Path, sys.argv[2:]))
print(before, peak())
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 0.4 GB, no tensor above 17 MB: what is needed beyond imports is a few blocks and a chunk."""
    config = make_config(hidden_size=1024, intermediate_size=8192, num_hidden_layers=8)
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    write_zeros(source, config)
    size = (source / "model.safetensors").stat().st_size / 2**20
    assert size > 400
    for way, origin, target in (("import_hf", "hf", "ckpt"), ("export_hf", "ckpt", "back")):
        command = [sys.executable, "-c", _PEAK, way, str(tmp_path / origin), str(tmp_path / target)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        before, after = map(int, output.split())
        assert after - before < 4 * 17 + 64, f"{way}: {before} -> {after} MiB"
        assert after < 1024


def make_config(**changes: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1000,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        **changes,
    }


def write_zeros(target: Path, config: dict[str, Any]) -> None:
    from nemo_rlhf.convert.families import architecture_of, weight_map

    weights = weight_map(architecture_of(config))
    header = lay_out(
        target / "model.safetensors", {name: (weights.shape(name), torch.bfloat16) for name in weights.tensors}
    )
    with (target / "model.safetensors").open("wb") as file:
        file.write(header.content)
        file.truncate(header.size)


def test_every_file_beside_the_weights_survives(hf: Path, tmp_path: Path) -> None:
    origin = tmp_path / "hf"
    shutil.copytree(hf, origin)
    names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"]
    names += ["merges.txt", "vocab.txt", "spiece.model", "qwen.tiktoken", "chat_template.jinja", "added_tokens.json"]
    names += ["additional_chat_templates/tool_use.jinja", "generation_config.json"]
    (origin / "additional_chat_templates").mkdir()
    for name in names:
        (origin / name).write_bytes(f"bytes of {name} \r\n".encode())
    odd = (origin / "config.json").read_text().replace("  ", "\t") + "\n\n"
    (origin / "config.json").write_text(odd)
    import_hf(origin, tmp_path / "ckpt")
    result = export_hf(tmp_path / "ckpt", tmp_path / "result")
    for name in [*names, "config.json"]:
        assert (result / name).read_bytes() == (origin / name).read_bytes(), name


def test_config_says_the_dtype_of_the_weights(tmp_path: Path) -> None:
    origin = make_hf(tmp_path / "hf", torch.bfloat16, **CASES["tied_llama3_grouped"])
    config = json.loads((origin / "config.json").read_text())
    (origin / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    import_hf(origin, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "result")
    assert Architecture.load(tmp_path / "ckpt").dtype == "bfloat16"
    assert json.loads((tmp_path / "result" / "config.json").read_text()) == config


def test_tensors_keep_dtypes_of_their_own(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.float() + 1e-5 for name, tensor in tensors.items() if "norm" in name})

    origin = make_hf(tmp_path / "origin", torch.bfloat16, **CASES["wide_heads_linear"])
    mixed = rewrite(origin, tmp_path / "hf", change)
    import_hf(mixed, tmp_path / "ckpt")
    assert Architecture.load(tmp_path / "ckpt").dtype == "bfloat16"
    assert_same_weights(mixed, export_hf(tmp_path / "ckpt", tmp_path / "result"))
    assert contents(tmp_path / "result") == contents(mixed)


def shard(hf: Path, target: Path) -> tuple[Path, dict[str, str]]:
    """The model in two files, and its index."""
    shutil.copytree(hf, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names, index = sorted(tensors), {}
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, target / f"{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(part, f"{number}.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return target, index


def test_tensors_that_are_there_twice_are_named(hf: Path, tmp_path: Path) -> None:
    path, index = shard(hf, tmp_path / "hf")
    assert_same_weights(hf, path)
    first = load_file(path / "0.safetensors")
    more = {**first, "model.norm.weight": torch.ones(32)}
    save_file(more, path / "0.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds tensor model.norm.weight twice, in 0.safetensors and 1.safetensors"):
        open_hf(path)
    save_file({**first, "more": torch.ones(1)}, path / "0.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"0.safetensors holds tensor more, which the index does not name"):
        open_hf(path)
    save_file(first, path / "0.safetensors", metadata={"format": "pt"})
    file = path / "model.safetensors.index.json"
    file.write_text(
        file.read_text().replace('"model.norm.weight"', '"lm_head.weight": "1.safetensors", "lm_head.weight"')
    )
    with pytest.raises(ValueError, match=r"names 'lm_head.weight' twice"):
        open_hf(path)
    file.write_text(json.dumps({"weight_map": {**index, "lm_head.weight": "1.safetensors"}}))
    with pytest.raises(ValueError, match=r"1.safetensors lacks tensor lm_head.weight"):
        open_hf(path)
    shutil.copy(hf / "model.safetensors", path)
    with pytest.raises(ValueError, match="are two models"):
        open_hf(path)


def test_damaged_checkpoints_are_told(hf: Path, tmp_path: Path, small_blocks: None) -> None:
    import_hf(hf, tmp_path / "ckpt")
    (tmp_path / "ckpt" / manifest.MANIFEST).unlink()
    weights = tmp_path / "ckpt" / "weights"
    architecture = Architecture.load(tmp_path / "ckpt")

    def altered(change: Any) -> None:
        metadata = pickle.loads((weights / ".metadata").read_bytes())
        change(metadata.state_dict_metadata)
        (weights / ".metadata").write_bytes(pickle.dumps(metadata))

    original = (weights / ".metadata").read_bytes()
    key = "decoder.layers.mlp.linear_fc2.weight"
    altered(lambda tensors: tensors[key].chunks.pop())
    with pytest.raises(ValueError, match=f"elements of {key}, which has 3072"):
        CheckpointSource(tmp_path / "ckpt", architecture)
    (weights / ".metadata").write_bytes(original)
    altered(lambda tensors: tensors[key].chunks.__setitem__(1, tensors[key].chunks[0]))
    with pytest.raises(ValueError, match=f"{key} has gaps or overlaps"):
        export_hf(tmp_path / "ckpt", tmp_path / "out")
    (weights / ".metadata").write_bytes(original)
    for path in sorted(weights.glob("*.distcp")):
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"__0_0.distcp ends before"):
        export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt"}


def test_counts_are_compared(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_hf(hf, tmp_path / "ckpt")
    for name in ("write_weights", "write_safetensors"):
        written = getattr(transfer, name)
        monkeypatch.setattr(transfer, name, lambda *arguments, written=written: _one_less(written(*arguments)))
    with pytest.raises(ValueError, match="parameters, but 25951 were converted"):
        import_hf(hf, tmp_path / "again")
    with pytest.raises(ValueError, match="parameters, but 25951 were converted"):
        export_hf(tmp_path / "ckpt", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt"}


def _one_less(result: Any) -> Any:
    return result - 1 if isinstance(result, int) else (result[0], result[1] - 1)


def test_what_was_there_survives_a_failed_attempt(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_hf(hf, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "back")
    before = contents(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "__0_0.distcp")

    with monkeypatch.context() as patched:
        patched.setattr(transfer, "write_weights", fail)
        patched.setattr(transfer, "write_safetensors", fail)
        for again in (
            lambda: import_hf(hf, tmp_path / "ckpt", force=True),
            lambda: export_hf(tmp_path / "ckpt", tmp_path / "back", force=True),
        ):
            with pytest.raises(OSError, match=r"could not be written \(.*No space left on device"):
                again()
    assert contents(tmp_path) == before
    (tmp_path / "ckpt" / "weights" / "__99_0.distcp").write_text("stale")
    import_hf(hf, tmp_path / "ckpt", force=True)
    export_hf(tmp_path / "ckpt", tmp_path / "back", force=True)
    assert contents(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory of another file system, of 100 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a file system here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def said(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence with which a command refuses."""
    assert main(["convert", *map(str, arguments)]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    return line


def test_disks_that_cannot_take_it(
    hf: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import_hf(hf, tmp_path / "ckpt")
    ways = (("import", hf, small_disk / "ckpt"), ("export", tmp_path / "ckpt", small_disk / "hf"))
    for way in ways:
        assert "needs 0.00 GB, but 0.00 GB are free" in said(capsys, *way)
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(directories.shutil, "disk_usage", lambda path: room)  # as if it filled up meanwhile
    for way in ways:
        line = said(capsys, *way)
        assert f"{way[2]} could not be written" in line and "No space left on device" in line
    assert not list(small_disk.iterdir())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "cannot be written to (Read-only file system)" in said(capsys, *ways[0])
    with pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\)"):
        export_hf(*ways[1][1:])


def test_wrong_input_gets_one_sentence(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(hf, cut)
    (cut / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-10])
    assert "model.safetensors is damaged" in said(capsys, "import", cut, tmp_path / "ckpt")
    (tmp_path / "taken").mkdir()
    assert "taken exists already" in said(capsys, "import", hf, tmp_path / "taken")
    (tmp_path / "taken" / "photo").touch()
    assert "holds something else than a model" in said(capsys, "import", hf, tmp_path / "taken", "--force")
    assert "workers=0" in said(capsys, "import", hf, tmp_path / "ckpt", "--workers", "0")
    assert {path.name for path in tmp_path.iterdir()} == {"cut", "taken"}


_SLOW = """
import sys, time
from pathlib import Path
from nemo_rlhf.convert import to_megatron, transfer
real = to_megatron.fill
def fill(*arguments):  # workers import this file, and so are slow too
    time.sleep(0.2)
    return real(*arguments)
to_megatron.fill, to_megatron._FILE, to_megatron._CHUNK = fill, 7000, 1500
if __name__ == "__main__":
    transfer.import_hf(*map(Path, sys.argv[1:]), workers=2)
"""


def test_two_do_not_write_one_directory(hf: Path, tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    with alone(target), pytest.raises(ValueError, match=r"ckpt is being written by another process: wait for it"):
        import_hf(hf, target)
    assert not list(tmp_path.iterdir())
    import_hf(hf, target)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_killed_in_the_middle(hf: Path, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(_SLOW)
    target, unfinished = tmp_path / "out" / "ckpt", tmp_path / "out" / ".ckpt.unfinished"
    command = [sys.executable, str(script), str(hf), str(target)]
    for victim in ("worker", "parent"):
        with subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
        ) as process:
            deadline = time.monotonic() + 60
            while len(list(unfinished.glob("weights/*.distcp"))) < 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            family = psutil.Process(process.pid).children(recursive=True)
            workers = [child for child in family if any("spawn_main" in part for part in child.cmdline())]
            assert len(workers) == 2
            (workers[0] if victim == "worker" else process).send_signal(signal.SIGKILL)
            assert process.stderr is not None
            output = process.stderr.read()
        assert process.returncode != 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, "a worker outlives its parent"
        if victim == "worker":
            assert "one of the worker processes was killed" in output
            assert not list((tmp_path / "out").iterdir())
    for path in (target, unfinished):  # what is left is no checkpoint
        with pytest.raises(ValueError, match=r"There is no directory|is neither"):
            resolve_restore_from(path)
    import_hf(hf, target)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ckpt"}
    assert manifest.files(target)
