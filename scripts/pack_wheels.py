"""Puts the wheels that scripts/gpu_check.sh needs beside torch into one folder.

    python scripts/pack_wheels.py FOLDER [--python-version 3.12] [--platform manylinux_2_28_x86_64 ...]

In the versions of the environment that runs this, so that what runs on the GPU is what the tests ran with. The folder
is replaced. What NeMo only imports is left out: scripts/bench/stand_ins.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

LIMIT_MB = 60
# Nothing is resolved: torch, what torch brings itself and what is only imported would come along.
WHEELS = [
    "numpy",
    "packaging",
    "pyyaml",
    "tqdm",
    "einops",
    "psutil",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "megatron-core",
    "lightning",
    "pytorch-lightning",
    "lightning-utilities",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "transformers",
    "tokenizers",
    "safetensors",
    "regex",
    "huggingface_hub",
    "httpx2",
    "httpcore2",
    "h11",
    "anyio",
    "idna",
    "truststore",
    "click",
    "typer",
    "shellingham",
    "nemo-toolkit",
    "wrapt",
    "text-unidecode",
    "sentencepiece",
    "toml",
    "overrides",
    "StrEnum",
    "nv-one-logger-core",
    "nv-one-logger-pytorch-lightning-integration",
    "nv-one-logger-training-telemetry",
    "pydantic",
    "pydantic_core",
    "typing_inspection",
    "annotated_types",
    "aiohttp",
    "multidict",
    "attrs",
    "yarl",
    "propcache",
    "aiosignal",
    "frozenlist",
    "aiohappyeyeballs",
    "pytest",
    "pluggy",
    "iniconfig",
]
SOURCES = ["antlr4-python3-runtime"]  # of Hydra, and not published as a wheel; pure Python


def pack(folder: Path, python_version: str | None, platforms: list[str]) -> int:
    """Fills the folder and returns its bytes."""
    if folder.exists() and any(path.suffix != ".whl" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other things than wheels: name a folder that may be replaced.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target = [] if python_version is None else ["--python-version", python_version]
    for platform in platforms:
        target += ["--platform", platform]
    pip(["download", "--only-binary=:all:", "--dest", str(folder), *target, *pinned(WHEELS)])
    pip(["wheel", "--wheel-dir", str(folder), *pinned(SOURCES)])
    return sum(path.stat().st_size for path in folder.iterdir())


def pinned(names: list[str]) -> list[str]:
    return [f"{name}=={version(name)}" for name in names]


def pip(arguments: list[str]) -> None:
    command, *rest = arguments
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, *options, *rest], capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(f"pip {command} failed: {' '.join(errors) or done.stderr.strip()[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Wheels for scripts/gpu_check.sh.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python-version", help="of the machine with the GPU, e.g. 3.12 (default: this Python's)")
    parser.add_argument("--platform", action="append", default=[], help="of that machine, as pip names it; repeatable")
    options = parser.parse_args()
    try:
        size = pack(options.folder, options.python_version, options.platform) / 1e6
    except ValueError as error:
        sys.exit(str(error))
    count = sum(1 for _ in options.folder.iterdir())
    if size > LIMIT_MB:
        largest = sorted(options.folder.iterdir(), key=lambda path: -path.stat().st_size)[:5]
        names = ", ".join(f"{path.name.split('-')[0]} {path.stat().st_size / 1e6:.1f}" for path in largest)
        sys.exit(f"The wheels take {size:.1f} MB, and at most {LIMIT_MB} MB may travel; the largest: {names}.")
    print(f"{count} wheels, {size:.1f} MB, in {options.folder}")


if __name__ == "__main__":
    main()
