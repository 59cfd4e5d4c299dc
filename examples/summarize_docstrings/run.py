"""The whole quickstart in one program: corpus, SFT, PPO, export, comparison, report.

    PYTHONPATH=examples python -m summarize_docstrings.run [--out DIR] [--devices N] [--seed N]

Every step is a command that could be typed as well; it is printed before it runs. An interrupted run continues with
the first step that has not finished, and training with its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from summarize_docstrings.commands import Program, default_devices, newest_checkpoint

HERE = Path(__file__).resolve().parent
console = Console()


def main() -> int:
    options = _parse()
    out: Path = options.out
    data, sft, ppo = out / "data", out / "sft", out / "ppo"
    program = Program(options.devices, options.seed, console)
    program.step(1, "a corpus of docstrings and its tokenizer")
    model = program.prepare(data)

    program.step(2, f"SFT from random weights, tensor parallel {options.devices}")
    train = (f"data.train={data / 'train.jsonl'}", f"data.validation={data / 'heldout.jsonl'}")
    program.train("sft", HERE / "sft.yaml", sft, model, *train, *options.sft)

    program.step(3, f"PPO against ROUGE-L, policy and critic tensor parallel {options.devices}")
    prompts = (f"data.prompts={data / 'prompts.jsonl'}", f"data.validation_prompts={data / 'heldout_prompts.jsonl'}")
    program.train("ppo", HERE / "ppo.yaml", ppo, newest_checkpoint(sft), *prompts, *options.ppo)

    program.step(4, "export to Hugging Face")
    before, after = program.export(sft), program.export(ppo)

    program.step(5, "greedy summaries with plain transformers")
    from summarize_docstrings.evaluate import compare

    scores = compare(before, after, data / "heldout_prompts.jsonl", console)
    (out / "scores.json").write_text(json.dumps(scores) + "\n")

    program.step(6, "report")
    program.run("report", str(ppo))
    console.print(f"Done in {program.elapsed_s:.0f} s. The trained model: {ppo / 'hf'}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small Llama learns to summarise docstrings, by SFT and PPO.")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="directory of the run")
    parser.add_argument("--devices", type=int, help="processes, which share each layer (default: 2, or the only GPU)")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--sft", nargs="*", default=[], metavar="key=value", help="further configuration of SFT")
    parser.add_argument("--ppo", nargs="*", default=[], metavar="key=value", help="further configuration of PPO")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.devices = options.devices or default_devices()
    return options


if __name__ == "__main__":
    sys.exit(main())
