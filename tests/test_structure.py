"""The shape of the package: who may import whom, how long a module may be, what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_rlhf

PACKAGE = Path(nemo_rlhf.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of the others. A room that is not here must be added before it is built.
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "types": set(),
    "device": set(),
    "ops": {"types"},
    "losses": {"ops", "types"},
    "parallel": {"config", "types", "device"},
    "models": {"parallel", "ops", "types", "config"},
    "convert": {"parallel", "config"},
    "generation": {"parallel", "data", "types", "config"},
    "data": {"types", "config"},
    "rollout": {"generation", "ops", "types", "config"},
    "feedback": {"config", "types"},
    "launch": {"config"},
}
ROOMS["algorithms"] = set(ROOMS) - {"feedback", "launch"}
FOR_ALL = {"untrusted", "files"}
ROOMS = {room: set() for room in FOR_ALL} | {room: others | FOR_ALL for room, others in ROOMS.items()}
EVERYTHING = {"cli", "__init__", "__main__"}

# Heavy libraries, and the rooms that may import them. `device` stands in for CUDA by changing megatron.
LIBRARIES: dict[str, set[str]] = {
    "nemo": {"models", "cli"},
    "megatron": {"parallel", "models", "generation", "convert", "device"},
}
WITHOUT_TORCH = {"config", "feedback", "launch", *FOR_ALL}

# The aim is about 350 and 60; nothing passes these.
MAX_MODULE_LINES = 380
MAX_FUNCTION_LINES = 70
TORCH_LIKE = {"torch", "lightning", "transformers", "megatron", "nemo"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(source: str, package: str) -> set[str]:
    """Absolute names of all that ``source`` imports anywhere; ``package`` is where its relative imports start."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # "from nemo_rlhf import ops" names a room only in what follows.
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def forbidden(room: str, source: str, package: str) -> list[str]:
    """Imports that ``room`` must not make."""
    wrong = []
    for name in sorted(imported_modules(source, package)):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "nemo_rlhf":
            known = target in ROOMS or target in EVERYTHING
            if room not in EVERYTHING and target != room and (not known or target not in ROOMS[room]):
                wrong.append(name)
        elif (top in LIBRARIES and room not in LIBRARIES[top]) or (top in TORCH_LIKE and room in WITHOUT_TORCH):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table_of_rooms(path: Path) -> None:
    room = room_of(path)
    assert room in ROOMS or room in EVERYTHING, f"{room} is not in the table of rooms"
    package = ".".join(("nemo_rlhf", *path.relative_to(PACKAGE).parts[:-1]))
    assert forbidden(room, path.read_text(), package) == []


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("ops", "from nemo_rlhf.types import Rollout\nimport torch", []),
        ("ops", "from nemo_rlhf.config import load", ["nemo_rlhf.config.load"]),
        ("ops", "from nemo_rlhf import models", ["nemo_rlhf.models"]),
        ("ops", "def f():\n    import nemo_rlhf.cli.run", ["nemo_rlhf.cli.run"]),
        ("ops", "from ..config.load import load", ["nemo_rlhf.config.load.load"]),
        ("ops", "from . import gae\nfrom .gae import f", []),
        ("ops", "from nemo_rlhf.cellar import f", ["nemo_rlhf.cellar.f"]),
        ("ops", "import megatron.core as m", ["megatron.core"]),
        ("algorithms", "import nemo_rlhf.rollout.score, nemo_rlhf.feedback", ["nemo_rlhf.feedback"]),
        ("algorithms", "from nemo.core import ModelPT", ["nemo.core.ModelPT"]),
        ("models", "from nemo.core import ModelPT\nfrom megatron.core import parallel_state", []),
        ("config", "import torch.nn", ["torch.nn"]),
        ("cli", "import nemo_rlhf.algorithms.ppo, nemo.utils, torch", []),
        ("cli", "import megatron.core", ["megatron.core"]),
    ],
)
def test_the_check_itself(room: str, source: str, wrong: list[str]) -> None:
    assert forbidden(room, source, f"nemo_rlhf.{room}") == wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_open_by_saying_why_and_stay_short(path: Path) -> None:
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree) or not source.strip(), "a module opens by saying why it exists"
    assert len(source.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{node.name} is too long"


def seconds_to_run(code: str) -> float:
    """Least wall time of several fresh interpreters, since others may use the machine."""
    timed = f"import time; begin = time.perf_counter()\n{code}\nprint(time.perf_counter() - begin)"
    runs = [
        subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
        for _ in range(5)
    ]
    return min(float(run.stdout) for run in runs)


def test_import_is_quick_and_light() -> None:
    assert seconds_to_run("import nemo_rlhf") < 0.3
    code = f"import sys, nemo_rlhf; assert not {TORCH_LIKE!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
