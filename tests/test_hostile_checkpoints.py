"""Opening a checkpoint never runs what its author wrote, whichever file has it and whoever opens it."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.convert import export_hf, import_hf
from nemo_rlhf.parallel import manifest
from nemo_rlhf.parallel.metadata import _Record, _Unpickler, read_metadata
from tests import bombs
from tests.conftest import Tiny, write_tokenizer
from tests.spawn import run_distributed

WEIGHTS = {".metadata": ("beside", "as object"), "common.pt": ("saved", "whole"), "__0_0.distcp": ("chunks",)}
# the files of a step, below it, that a resumed run reads
PARTS = ("policy/weights", "training/policy/optimizer")
STEP = {f"{part}/{name}": ways for part in PARTS for name, ways in WEIGHTS.items()}
STEP |= dict.fromkeys(("state.pt", "lightning.pt", "training/policy/scheduler.pt"), ("saved",))
RESUMED = [f"{how}: {file}" for file, ways in STEP.items() for how in ways]
OPENED = [f"{how}: {file}" for file, ways in WEIGHTS.items() for how in ways]
OPENED += ["whole: .metadata", "legacy: common.pt"]
UNREAD = {"inspect": ("common.pt", "__0_0.distcp"), "export": ("common.pt",), "verify": ("common.pt",)}
ROUTES = ("inspect", "export", "verify", "generate", "restore_from", "critic", "kind: model", "serve-reward")
CARELESS = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # of torch.load, where nobody asks it for more
DAMAGED = ("export", "generate", "restore_from", "serve-reward")


def opened_by(route: str) -> list[str]:
    """The bombs to try by a route; fewer where it shares its way into a checkpoint with another."""
    return OPENED[:3] if route in ("critic", "kind: model", "serve-reward") else OPENED


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Tiny, judge: Path) -> Path:
    """Whole checkpoints of a language model and of a reward model, and the former's origin."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(tiny.hf, root / "hf")
    config = AutoConfig.from_pretrained(tiny.hf)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "hf")
    write_tokenizer(root / "hf")
    import_hf(root / "hf", root / "policy")
    import_hf(judge, root / "judge")
    return root


def command(route: str, tiny: Tiny, place: Path, opened: Path) -> list[str]:
    """What opens the checkpoint ``opened`` by a route."""
    run = opened.with_name(f"{opened.name}_run")
    if route in ("inspect", "export"):
        return ["convert", route, str(opened), *([str(run)] if route == "export" else [])]
    if route == "verify":
        return ["convert", "verify", str(place / "hf"), str(opened)]
    if route == "generate":
        return ["generate", str(opened), "--prompts", str(tiny.prompts), "--out", str(run)]
    if route == "serve-reward":
        return ["serve-reward", str(opened), "server.port=0"]
    if route == "restore_from":
        return tiny.sft(run, f"model.restore_from={opened}", "model.init=pretrained")
    source = f"[{{kind: model, name: judge, restore_from: '{opened}'}}]"
    more = {
        "critic": [f"model.critic.restore_from={opened}"],
        "kind: model": ["reward.function=null", f"reward.sources={source}"],
    }
    return tiny.ppo(run, *more[route])


@pytest.fixture(scope="module")
def outcomes(tiny: Tiny, place: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What was said, by route and bomb, in one process after another run of it."""
    payload: list[dict[str, Any]] = [
        {"arguments": tiny.sft(place / "run", "trainer.max_steps=1", "trainer.val_check_interval=1")}
    ]
    keys = [("run", "")]
    for route in ROUTES:
        for case in opened_by(route):
            how, file = case.split(": ")
            origin = place / ("judge" if route in ("critic", "kind: model", "serve-reward") else "policy")
            opened = place / f"{len(keys)}"
            payload.append(
                {
                    "arguments": command(route, tiny, place, opened),
                    "copy": (str(origin), str(opened)),
                    "env": CARELESS,
                    "plant": (how, str(opened / "weights" / file), str(opened / "EXECUTED")),
                }
            )
            keys.append((route, case))
    for case in RESUMED:
        how, file = case.split(": ")
        run = place / f"{len(keys)}"
        payload.append(
            {
                "arguments": tiny.sft(run, "trainer.max_steps=2", "trainer.val_check_interval=1"),
                "copy": (str(place / "run"), str(run)),
                "env": CARELESS,
                "plant": (how, str(run / "checkpoints" / "step_1" / file), str(run / "EXECUTED")),
            }
        )
        keys.append(("resume", case))
    for route in DAMAGED:
        opened = place / f"{len(keys)}"
        origin, model = (place / "run", "checkpoints/step_1") if route != "serve-reward" else (place / "judge", "")
        file = opened / model / ("policy" if model else "") / "weights" / "__0_0.distcp"
        arguments = command(route, tiny, place, opened / model)
        payload.append({"arguments": arguments, "copy": (str(origin), str(opened)), "damage": str(file)})
        keys.append(("damaged", route))
    (results,) = run_distributed("tests.workers.run_worker:runs", 1, payload, timeout_s=300)
    assert results[0]["code"] == 0, results[0]
    return dict(zip(keys, results, strict=True))


@pytest.mark.parametrize(
    ("route", "case"), [*((r, c) for r in ROUTES for c in opened_by(r)), *(("resume", c) for c in RESUMED)]
)
def test_a_bomb_is_refused_in_one_sentence(
    route: str, case: str, place: Path, outcomes: dict[tuple[str, str], dict[str, Any]]
) -> None:
    found = outcomes[route, case]
    assert "traceback" not in found, found["traceback"]
    assert not list(place.glob("*/EXECUTED"))
    lines = [line for line in found["stderr"].splitlines() if line.startswith("nemo-rlhf: error")]
    if case.split(": ")[1] in UNREAD.get(route, ()):
        assert (found["code"], lines) == (0, [])
        return
    assert found["code"] == 2, found["stderr"]
    assert len(lines) == 1
    assert "Traceback" not in found["stderr"]


@pytest.mark.parametrize("how", ["whole", "saved", "legacy", "beside", "as object"])
def test_the_bombs_go_off_where_nobody_takes_care(how: str, place: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(place / "policy" / "weights", tmp_path / "weights")
    marker = tmp_path / "EXECUTED"
    file = weights / (".metadata" if how in ("whole", "beside", "as object") else "common.pt")
    bombs.plant(how, str(file), str(marker))
    if how in ("whole", "beside"):
        pickle.loads(file.read_bytes())
    else:
        torch.load(weights / "__9_9.distcp" if how == "as object" else file, weights_only=False)
    assert marker.exists()


class _Names:
    """Its pickle asks for one name and calls it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def pickle(self, protocol: int) -> bytes:
        module, _, name = self.name.rpartition(":")
        head = b"\x80" + bytes([protocol])
        if protocol < 4:
            return head + f"c{module}\n{name}\n".encode() + b"(tR."
        text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
        return head + text + b"\x93)R."


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "torch.distributed.checkpoint.metadata:os.system",
        "torch.distributed.checkpoint.filesystem:pickle.loads",
        "torch.distributed.checkpoint.filesystem:_create_file_view",
        "torch:load",
        "torch:hub.load",
        "torch.serialization:load",
        "copyreg:_reconstructor",
        "megatron.core.dist_checkpointing.strategies.torch:io.open",
    ],
)
def test_names_beyond_torch_s_metadata_are_refused(name: str, protocol: int, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(_Names(name).pickle(protocol))
    with pytest.raises(ValueError, match="which is no part of torch's metadata") as caught:
        read_metadata(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # before and since Python 3.13
@pytest.mark.parametrize("name", ["PosixPath", "PurePosixPath"])
def test_paths_of_every_python_are_records(module: str, name: str, protocol: int) -> None:
    record = _Unpickler(io.BytesIO(_Names(f"{module}:{name}").pickle(protocol))).load()
    assert type(record).__mro__[1] is _Record


def changed(place: Path, tmp_path: Path, change: Any) -> Path:
    """Weights whose ``.metadata`` ``change`` has had in its hands."""
    weights = shutil.copytree(place / "policy" / "weights", tmp_path / "weights")
    described = pickle.loads((weights / ".metadata").read_bytes())
    change(described)
    (weights / ".metadata").write_bytes(pickle.dumps(described))
    return weights


def _elsewhere(name: str) -> Any:
    def change(described: Any) -> None:
        for place in described.storage_data.values():
            place.relative_path = name

    return change


def _first(**values: Any) -> Any:
    def change(described: Any) -> None:
        for name, value in values.items():
            setattr(next(iter(described.storage_data.values())), name, value)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_elsewhere("/dev/zero"), "names '/dev/zero', and there is no such file"),
        (_elsewhere("../weights/__0_0.distcp"), "no such file"),
        (_elsewhere(".."), "no such file"),
        (_elsewhere("gone.distcp"), "no such file"),
        (_first(offset=1 << 40), "ends before"),
        (_first(offset=-1), "where sizes belong"),
        (_first(length="9"), "where sizes belong"),
        (_first(relative_path=7), "where a name belongs"),
        (_first(transform_descriptors=["zstd"]), "in a form that is not read here"),
        (lambda d: setattr(d, "storage_data", None), "where a mapping belongs"),
        (lambda d: setattr(d, "state_dict_metadata", [1]), "where a mapping belongs"),
        (lambda d: next(iter(d.state_dict_metadata.values())).chunks.pop(), "it holds"),
        (lambda d: vars(next(iter(d.state_dict_metadata.values()))).pop("properties"), "KeyError: 'properties'"),
    ],
)
def test_what_metadata_says_is_checked(change: Any, says: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        read_metadata(changed(place, tmp_path, change))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "value", [{"a": 1}, [torch.ones(2)], "text", torch.ones(3).to_sparse(), torch.ones(3), torch.ones(32).double()]
)
def test_what_is_no_such_tensor_is_refused(value: Any, place: Path, tmp_path: Path) -> None:
    def change(described: Any) -> None:
        _, found = next(item for item in described.storage_data.items() if item[0].fqn.endswith("layernorm.weight"))
        torch.save(value, tmp_path / "weights" / "__9_0.distcp")
        found.relative_path, found.offset = "__9_0.distcp", 0
        found.length = (tmp_path / "weights" / "__9_0.distcp").stat().st_size

    changed(place, tmp_path, change)
    for name in ("model_config.yaml", "tokenizer"):
        (tmp_path / name).symlink_to(place / "policy" / name)
    with pytest.raises(ValueError, match=r"__9_0\.distcp (is damaged|holds other values)"):
        export_hf(tmp_path, tmp_path.with_name(f"{tmp_path.name}_hf"))


def test_files_that_are_no_metadata_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"\x80", b"garbage", pickle.dumps([1]), pickle.dumps({"a": torch.float32})):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match="is not the description of a checkpoint"):
            read_metadata(tmp_path)
    (tmp_path / ".metadata").unlink()
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(ValueError, match="not a regular file"):
        read_metadata(tmp_path)


def test_metadata_that_is_whole_says_what_torch_says(place: Path) -> None:
    weights = place / "policy" / "weights"
    ours, theirs = read_metadata(weights), pickle.loads((weights / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


@pytest.mark.parametrize("route", DAMAGED)
def test_damaged_weights_are_not_used(route: str, outcomes: dict[tuple[str, str], dict[str, Any]]) -> None:
    found = outcomes["damaged", route]
    assert found["code"] == 2, found
    assert re.search(r"the checkpoint .* is damaged: weights/__0_0.distcp is missing or differs", found["stderr"])


def weights_of(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def test_what_people_may_edit_is_not_compared(place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "policy", tmp_path / "policy")
    for file in ("model_config.yaml", "tokenizer/config.json"):
        (copy / file).write_text((copy / file).read_text() + "\n")
    export_hf(copy, tmp_path / "hf")
    (copy / manifest.MANIFEST).unlink()  # and without a manifest nothing is
    export_hf(copy, tmp_path / "again")
    assert (
        weights_of(tmp_path / "hf")
        == weights_of(tmp_path / "again")
        == weights_of(export_hf(place / "policy", tmp_path / "whole"))
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "holds a list"),
        ("{}", "names no files"),
        ("[" * 100_000, "nested too deeply"),
        ('{"files": {"/dev/zero": [0, 0]}}', "names '/dev/zero', which is not below it"),
        ('{"files": {"weights/../../x": [0, 0]}}', "which is not below it"),
        ('{"files": {"weights/common.pt": [1]}}', "no size and checksum"),
        ('{"files": {"weights/common.pt": [1, 2]}}', "weights/common.pt is missing or differs"),
        ('{"files": {"weights/pipe": [0, 0]}}', "weights/pipe is missing or differs"),
        ('{"files": {"weights/zero": [0, 0]}}', "weights/zero is missing or differs"),
    ],
)
def test_a_manifest_cannot_lead_elsewhere(content: str, says: str, place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "policy", tmp_path / "policy")
    os.mkfifo(copy / "weights" / "pipe")
    (copy / "weights" / "zero").symlink_to("/dev/zero")
    (copy / manifest.MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=says):
        export_hf(copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_manifest_of_others_in_the_directory_above_is_not_ours(place: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(place / "policy", tmp_path / "models" / "policy")
    (copy / manifest.MANIFEST).unlink()
    (tmp_path / "models" / manifest.MANIFEST).write_text("[]")
    export_hf(copy, tmp_path / "hf")
    assert weights_of(tmp_path / "hf") == weights_of(export_hf(place / "policy", tmp_path / "whole"))
