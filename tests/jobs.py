"""Jobs of real processes: the console program or a script, started, watched and found again after its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
_MARK = "NEMO_RLHF_TEST_JOB"
FROM_OUTSIDE = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NEMO_RLHF_LAUNCHED",
)
# what differs between two runs that are otherwise the same
_OF_THE_MACHINE = ("time/", "perf/", "memory/")


class Job:
    """A running ``nemo-rlhf`` (or any other Python command line), with all processes that came of it."""

    def __init__(self, arguments: list[str], cwd: Path, *, module: str | None = "nemo_rlhf", **env: str) -> None:
        self._mark = uuid.uuid4().hex
        outside = {k: v for k, v in os.environ.items() if k not in FROM_OUTSIDE and not k.startswith("SLURM_")}
        self._out, self._err = cwd / f"{self._mark}.out", cwd / f"{self._mark}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *(["-m", module] if module else []), *arguments],
                cwd=cwd,
                env={**outside, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", _MARK: self._mark, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Every process with this job's mark in its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that are ranks by now: children of the launcher."""
        found = {}
        for process in psutil.Process(self.process.pid).children():
            if (rank := process.environ().get("RANK")) is not None:
                found[int(rank)] = process
        return found

    def wait_until(self, reached: Callable[[], Any], timeout_s: float = 240.0, interval_s: float = 0.005) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, f"ended with {self.process.returncode} too early:\n{self.stderr}"
            assert time.monotonic() < deadline, f"was not reached in {timeout_s} s:\n{self.stderr}"
            time.sleep(interval_s)

    def wait(self, timeout_s: float = 240.0) -> int:
        """The exit code; whatever is left of the job after it, or after the time, is an error and is killed."""
        try:
            code = self.process.wait(timeout_s)
            left = self.processes()
            assert not left, f"{left} outlived the job"
        finally:
            for process in self.processes():
                process.send_signal(signal.SIGKILL)
            self.process.wait()
        return code


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` without what the machine's speed decides."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(_OF_THE_MACHINE)} for row in rows]


def rollouts_of(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """What was sampled in each step."""
    files = sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def assert_same_rollouts(found: Path, expected: Path) -> None:
    """Of two runs under different cuts: every sample the same, and what models say of it but for rounding."""
    of_models = ("kl", "advantage")
    one, other = rollouts_of(found), rollouts_of(expected)
    assert one.keys() == other.keys() and one
    for step, samples in other.items():
        assert len(one[step]) == len(samples)
        for actual, sample in zip(one[step], samples, strict=True):
            for name in of_models:
                assert actual.pop(name) == pytest.approx(sample.pop(name), rel=1e-3, abs=2e-5), (step, name)
            assert actual == sample


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("nemo-rlhf: error")]


def with_program() -> dict[str, str]:
    """An environment in which ``nemo-rlhf`` is this checkout's."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
