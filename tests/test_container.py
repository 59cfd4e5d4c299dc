"""The Dockerfile, as far as it can be checked without its base image: lint, what it copies, what it keeps as it is."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from nemo_rlhf.config import config_directory

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run([hadolint, file], capture_output=True, text=True, check=False)


def copied() -> list[tuple[str, str]]:
    """(source, target) of what the Dockerfile copies."""
    pairs = []
    for line in re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.MULTILINE):
        *sources, target = line.split()
        pairs += [(source, target) for source in sources]
    return pairs


def pins() -> Any:
    spec = importlib.util.spec_from_file_location("pins", ROOT / "docker" / "pins.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_linter_has_nothing_to_say(tmp_path: Path) -> None:
    said = lint(DOCKERFILE)
    assert (said.returncode, said.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM nvcr.io/nvidia/pytorch\nRUN pip install nemo-rlhf\n")
    assert lint(bad).returncode == 1 and "DL3006" in lint(bad).stdout


def test_a_distribution_without_a_name_does_not_end_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, broken = version("torch"), tmp_path / "torch-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert pins().main("write", tmp_path / "pins.txt") == 0
    assert f"torch=={torch}\n" in (tmp_path / "pins.txt").read_text()


def test_the_base_is_pinned() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", text, re.MULTILINE)
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert base in (ROOT / "docker" / "README.md").read_text()


def test_the_extra_gpu_is_what_megatron_core_supports() -> None:
    """Its extra dev names the versions that it is tested with."""
    (theirs,) = (Requirement(one) for one in requires("megatron-core") or [] if one.startswith("transformer-engine"))
    (ours,) = re.findall(r'^gpu = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    upper = [str(one) for one in theirs.specifier if one.operator == "<"]
    assert upper == ["<2.12.0"] and str(Requirement(ours).specifier) == "<2.12,>=2.6"


def test_what_is_copied_exists_and_is_sent() -> None:
    sent = [line for line in (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    for source, _ in copied():
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, line[1:]) for line in sent)
    assert len(copied()) == len(sent)


def test_what_is_copied_makes_the_whole_package(tmp_path: Path) -> None:
    image = tmp_path / "image"
    for source, target in copied():
        place = image / target.lstrip("/")
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            file = place / source if target.endswith("/") else place
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, file)
    (installed,) = re.findall(r"pip install .*? (/\S+)", DOCKERFILE.read_text())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        "wheels",
    ]
    subprocess.run([*command, str(image / installed.lstrip("/"))], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("nemo_rlhf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "nemo-rlhf = nemo_rlhf.cli:main" in archive.read(entry).decode()
    conf = config_directory()
    assert {f"nemo_rlhf/conf/{path.relative_to(conf)}" for path in conf.rglob("*.yaml")} <= names
    package = [path for path in (ROOT / "nemo_rlhf").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in package} <= names


def test_compiled_packages_are_pinned() -> None:
    held = [("Torch", "2.9.0a0+50eac8"), ("transformer_engine", "2.7"), ("flash-attn", "2.7.4"), ("numpy", "1.26.4")]
    free = [("packaging", "23.2"), ("torchmetrics", "1.9"), ("lightning", "2.4.0"), ("sympy", "1.14")]
    found = pins().installed_pins([*held, *free, ("torch", "2.9.0a0+50eac8"), (None, "1.0")])
    assert found == ["flash-attn==2.7.4", "numpy==1.26.4", "torch==2.9.0a0+50eac8", "transformer-engine==2.7"]


def test_a_replaced_package_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pins.txt"
    assert pins().main("write", file) == 0
    assert f"torch=={version('torch')}\n" in file.read_text()
    assert pins().main("check", file) == 0
    file.write_text(file.read_text() + "numpy==1.0\napex==0.1\n")
    assert pins().main("check", file) == 1
    said = capsys.readouterr().err
    assert f"numpy 1.0 of the base image was replaced by {version('numpy')}." in said
    assert "apex 0.1 of the base image was replaced by nothing." in said
