"""Draws over-optimisation: what the reward model says of each step's samples, and what ROUGE-L says.

    PYTHONPATH=examples python -m summarize.plot runs/seed_1 runs/seed_2 --out overoptimisation.png

Each directory is one of ``summarize.run``, once with its default ``--kl`` and once with ``--kl 0``; thin lines are
runs, the thick ones their means.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = {"reward/preference": "reward model, standard deviations", "reward/rouge_l": "ROUGE-L, watched only"}
COLORS = ("#2563eb", "#dc2626")


def curves(runs: Sequence[Path], kl: str, metric: str) -> list[list[float]]:
    """[runs][steps] of ``metric`` in each run's PPO with this KL coefficient. Raises ValueError where one has none."""
    found = []
    for run in runs:
        file = run / f"ppo_kl_{kl}" / "metrics.jsonl"
        if not file.is_file():
            raise ValueError(f"{run} has no PPO run with --kl {kl}: run summarize.run --out {run} --kl {kl} first.")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found.append([row[metric] for row in rows if metric in row])
    return found


def draw(runs: Sequence[Path], coefficients: Sequence[str], out: Path) -> None:
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(9, 3.4), dpi=110, layout="constrained")
    for axis, (metric, title) in zip(axes, PANELS.items(), strict=True):
        for kl, color in zip(coefficients, COLORS, strict=False):
            lines = curves(runs, kl, metric)
            steps = range(1, min(map(len, lines)) + 1)
            for line in lines:
                axis.plot(steps, line[: len(steps)], color=color, alpha=0.3, linewidth=0.8)
            mean = [sum(values) / len(values) for values in zip(*lines, strict=False)]
            axis.plot(steps, mean, color=color, linewidth=2, label=f"KL coefficient {kl}")
        axis.set(title=title, xlabel="PPO step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Reward model and ROUGE-L over PPO, with and without a KL penalty.")
    parser.add_argument("runs", nargs="+", type=Path, help="directories of summarize.run")
    parser.add_argument("--kl", nargs="+", default=["0.05", "0"], help="coefficients that were run")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    options = parser.parse_args()
    draw(options.runs, options.kl, options.out)


if __name__ == "__main__":
    main()
