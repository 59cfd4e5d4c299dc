"""scripts/gpu_check.sh without a GPU: it says so, its Python runs with tiny sizes, and its wheels are all it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

from tests.test_slurm import passes_shellcheck

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
BENCH = ROOT / "scripts" / "bench"
TINY = [
    "vocab_size=64",
    "hidden_size=64",
    "intermediate_size=128",
    "num_hidden_layers=2",
    "num_attention_heads=4",
    "num_key_value_heads=2",
    "prompts=16",
    "prompt_tokens=8",
    "new_tokens=6",
    "batch=8",
    "copied_mib=4",
]
# what torch itself asks for
WITH_TORCH = ("torch", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy")
WITH_TORCH += ("typing_extensions",)


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    where = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=where)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run(SCRIPT)
    assert (done.returncode, done.stdout) == (0, "No NVIDIA GPU was found here: nothing was checked.\n")


def test_shellcheck_has_nothing_to_say() -> None:
    passes_shellcheck(SCRIPT, "--external-sources", f"--source-path={SCRIPT.parent}")


def test_the_table_has_every_figure() -> None:
    done = run(sys.executable, BENCH / "gpu_check.py", "--sizes", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    table = {what: (measured, beside) for what, measured, beside in cells[2:]}
    assert table["ratio at step 0, bf16"][0] == "1.00000000" and table["KL at step 0, bf16"][0] == "0"
    assert "skipped" in table["tests/gpu"][0] or "passed" in table["tests/gpu"][0]
    for what in ("decoding, ms a layer at 16 rows", "decoding, tokens/s"):
        assert float(table[what][0]) > 0 and "transformers" in table[what][1] and "floor" in table[what][1]
    for phase in ("rollout", "experience", "update"):
        assert float(table[f"PPO, {phase}, s in the second step"][0]) > 0
        assert "first step" in table[f"PPO, {phase}, s in the second step"][1]
        assert table[f"PPO, {phase}, GiB at most"][1].startswith("planned")


def test_a_part_that_fails_or_is_late_is_a_line_of_the_table() -> None:
    done = run(sys.executable, BENCH / "gpu_check.py", "--seconds", "1", "--sizes", *TINY)
    assert done.returncode == 1
    assert "| ppo | not done after" in done.stdout


def test_packing_refuses_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    done = run(sys.executable, ROOT / "scripts" / "pack_wheels.py", tmp_path)
    assert done.returncode == 1 and (tmp_path / "mine.txt").exists()
    assert done.stderr == f"{tmp_path} holds other things than wheels: name a folder that may be replaced.\n"


def test_packed_packages_and_torch_are_enough(tmp_path: Path) -> None:
    """What ``--pack`` downloads is linked from the environment that runs this instead: the same distributions."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from pack_wheels import SOURCES, WHEELS
    finally:
        sys.path.pop(0)
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for name in (*WITH_TORCH, *WHEELS, *SOURCES):
        for file in distribution(name).files or ():
            top = file.parts[0]
            source = Path(str(distribution(name).locate_file(top)))
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(source)
    path = os.pathsep.join([str(ROOT), str(BENCH / "stand_ins")])
    python = tmp_path / "venv" / "bin" / "python"
    assert run(python, "-c", "import pyarrow", PYTHONPATH=path).returncode  # nothing else is there
    helped = run(python, "-m", "nemo_rlhf", "--help", PYTHONPATH=path)
    assert helped.returncode == 0 and "ppo" in helped.stdout, helped.stderr
    case = ["--case", "everything on the GPU", "--steps", "2", "--sizes", *TINY]
    done = run(python, "-W", "ignore", BENCH / "gpu.py", *case, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    tests = run(python, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu"), PYTHONPATH=path)
    assert tests.returncode == 0, tests.stdout
