"""PPO learns: the randomwalks example, stopped early, reaches a figure under tensor parallelism."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, AT_LEAST = 10, 0.8  # 40 updates; the full run has 160 and ends at 0.99


def test_randomwalks(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "examples" / "randomwalks.py")]
    command += ["--out", str(tmp_path), "--tp", "2", "--steps", str(STEPS)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reached = re.findall(r"^optimality ([0-9.]+)$", done.stdout, flags=re.MULTILINE)
    assert len(reached) == 1, done.stdout
    started = re.search(r"step +0/\d+ +val reward ([0-9.]+)", done.stderr)
    assert started and float(started[1]) < 0.5, "the start must leave something to learn"
    assert float(reached[0]) >= AT_LEAST
