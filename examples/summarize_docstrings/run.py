"""The whole quickstart in one program: corpus, SFT, PPO, export, comparison, report.

    PYTHONPATH=examples python -m summarize_docstrings.run [--out DIR] [--devices N] [--seed N]

Every step is a command that could be typed as well; it is printed before it runs. An interrupted run continues with
the first step that has not finished, and training with its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).resolve().parent
console = Console()


def main() -> int:
    options = _parse()
    out: Path = options.out
    data, sft, ppo = out / "data", out / "sft", out / "ppo"
    started = time.monotonic()

    def step(number: int, title: str) -> None:
        console.rule(f"[bold]{number}/6 {title}[/bold] ({time.monotonic() - started:.0f} s so far)", align="left")

    step(1, "a corpus of docstrings and its tokenizer")
    model = data / "model"
    if not (model / "config.json").is_file():
        from summarize_docstrings.prepare import prepare

        prepare(data, console=console)

    devices = _layout(options.devices)
    step(2, f"SFT from random weights, tensor parallel {options.devices}")
    train = (f"data.train={data / 'train.jsonl'}", f"data.validation={data / 'heldout.jsonl'}")
    _nemo_rlhf(options, "sft", *_common(options, sft, model), *devices, *train, *options.sft)

    step(3, f"PPO against ROUGE-L, policy and critic tensor parallel {options.devices}")
    prompts = (f"data.prompts={data / 'prompts.jsonl'}", f"data.validation_prompts={data / 'heldout_prompts.jsonl'}")
    _nemo_rlhf(options, "ppo", *_common(options, ppo, newest_checkpoint(sft)), *devices, *prompts, *options.ppo)

    step(4, "export to Hugging Face")
    for run in (sft, ppo):
        if not (run / "hf").is_dir():
            _nemo_rlhf(options, "convert", "export", str(newest_checkpoint(run)), str(run / "hf"))

    step(5, "greedy summaries with plain transformers")
    from summarize_docstrings.evaluate import compare

    scores = compare(sft / "hf", ppo / "hf", data / "heldout_prompts.jsonl", console)
    (out / "scores.json").write_text(json.dumps(scores) + "\n")

    step(6, "report")
    _nemo_rlhf(options, "report", str(ppo))
    console.print(f"Done in {time.monotonic() - started:.0f} s. The trained model: {ppo / 'hf'}")
    return 0


def newest_checkpoint(run_directory: Path) -> Path:
    """The last of ``checkpoints/step_N``. Raises FileNotFoundError when the run has saved none."""
    found = (run_directory / "checkpoints").glob("step_*")
    steps = {int(path.name.removeprefix("step_")): path for path in found if path.name[5:].isdigit()}
    if not steps:
        raise FileNotFoundError(f"{run_directory} has no checkpoint.")
    return steps[max(steps)]


def _common(options: argparse.Namespace, run_directory: Path, restore_from: Path) -> tuple[str, ...]:
    return (
        f"seed={options.seed}",
        f"model.restore_from={restore_from}",
        f"exp_manager.explicit_log_dir={run_directory}",
    )


def _layout(devices: int) -> tuple[str, ...]:
    return (f"trainer.devices={devices}", f"model.tensor_model_parallel_size={devices}")


def _nemo_rlhf(options: argparse.Namespace, command: str, *arguments: str) -> None:
    """Run one command of the console program; its failure ends ours, with its exit code."""
    config = HERE / f"{command}.yaml"
    full = [command, *(("--config", str(config)) if config.is_file() else ()), *arguments]
    console.print("nemo-rlhf " + " ".join(full), style="dim", highlight=False)
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), env.get("PYTHONPATH"))))
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.devices)))
    code = subprocess.run([sys.executable, "-m", "nemo_rlhf", *full], env=env, check=False).returncode
    if code != 0:
        console.print(f"nemo-rlhf {command} ended with exit code {code}; the same command again continues.")
        sys.exit(code)


def _default_devices() -> int:
    """Two processes on a CPU, so that tensor parallelism is real; on GPUs two of them, or the only one."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small Llama learns to summarise docstrings, by SFT and PPO.")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="directory of the run")
    parser.add_argument("--devices", type=int, help="processes, which share each layer (default: 2, or the only GPU)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--sft", nargs="*", default=[], metavar="key=value", help="further configuration of SFT")
    parser.add_argument("--ppo", nargs="*", default=[], metavar="key=value", help="further configuration of PPO")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.devices = options.devices or _default_devices()
    return options


if __name__ == "__main__":
    sys.exit(main())
