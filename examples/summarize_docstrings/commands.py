"""How the examples call ``nemo-rlhf``: each command is printed before it runs, and its failure ends the example."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

EXAMPLES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Program:
    """The console program in ``devices`` processes, which share each layer (tensor parallelism)."""

    devices: int
    seed: int
    console: Console
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def step(self, number: int, title: str) -> None:
        """The heading of one of an example's six steps."""
        self.console.rule(f"[bold]{number}/6 {title}[/bold] ({self.elapsed_s:.0f} s so far)", align="left")

    def prepare(self, data: Path) -> Path:
        """The corpus and the shape of a model, where there is none yet; the model's directory."""
        model = data / "model"
        if not (model / "config.json").is_file():
            from summarize_docstrings.prepare import prepare

            prepare(data, console=self.console)
        return model

    @property
    def cut(self) -> tuple[str, ...]:
        return (f"trainer.devices={self.devices}", f"model.tensor_model_parallel_size={self.devices}")

    def train(self, command: str, config: Path, run_directory: Path, restore_from: Path, *arguments: str) -> None:
        """A training command; a run that has stopped is continued, and one that is done ends at once."""
        common = (
            f"seed={self.seed}",
            f"model.restore_from={restore_from}",
            f"exp_manager.explicit_log_dir={run_directory}",
        )
        self.run(command, "--config", str(config), *common, *self.cut, *arguments)

    def run(self, command: str, *arguments: str) -> None:
        """Any command."""
        with self.start(command, *arguments) as process:
            code = process.wait()
        if code != 0:
            self.console.print(f"nemo-rlhf {command} ended with exit code {code}; the same command again continues.")
            sys.exit(code)

    def start(self, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Any command, without waiting for its end."""
        full = [command, *arguments]
        self.console.print("nemo-rlhf " + " ".join(full), style="dim", highlight=False, markup=False)
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(EXAMPLES), env.get("PYTHONPATH"))))
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.devices)))
        return subprocess.Popen([sys.executable, "-m", "nemo_rlhf", *full], env=env)

    def export(self, run_directory: Path) -> Path:
        """The run's last checkpoint as a Hugging Face directory, which is made where there is none yet."""
        directory = run_directory / "hf"
        if not directory.is_dir():
            self.run("convert", "export", str(newest_checkpoint(run_directory)), str(directory))
        return directory


def newest_checkpoint(run_directory: Path) -> Path:
    """The last of ``checkpoints/step_N``. Raises FileNotFoundError when the run has saved none."""
    found = (run_directory / "checkpoints").glob("step_*")
    steps = {int(path.name.removeprefix("step_")): path for path in found if path.name[5:].isdigit()}
    if not steps:
        raise FileNotFoundError(f"{run_directory} has no checkpoint.")
    return steps[max(steps)]


def default_devices() -> int:
    """Two processes on a CPU, so that tensor parallelism is real; on GPUs two of them, or the only one."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
