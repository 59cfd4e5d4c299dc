"""What came of it: win rates, best of N, and the table of all figures, on the terminal and in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from summarize_docstrings.reward import rouge_l

COLUMNS = ("held-out summaries", "ROUGE-L", "reward model", "wins against SFT", "words")


@dataclass(frozen=True)
class Figures:
    """Means over held-out prompts. ``score``: of the reward model, in standard deviations above its held-out mean.
    ``win_rate``: by ROUGE-L, against the SFT policy's summaries, decoded in the same way; None for those themselves.
    """

    name: str
    rouge_l: float
    score: float
    win_rate: float | None
    words: float

    @property
    def cells(self) -> tuple[str, ...]:
        wins = "" if self.win_rate is None else f"{self.win_rate:.1%}"
        return (self.name, f"{self.rouge_l:.4f}", f"{self.score:+.3f}", wins, f"{self.words:.1f}")


def measure(
    name: str,
    summaries: Sequence[str],
    references: Sequence[str],
    scores: Sequence[float],
    against: Sequence[str] | None = None,
) -> Figures:
    """Figures of one summary for each prompt; ``against``: those of the SFT policy."""
    rouge = [rouge_l(*both) for both in zip(summaries, references, strict=True)]
    wins = None
    if against is not None:
        wins = win_rate(rouge, [rouge_l(*both) for both in zip(against, references, strict=True)])
    words = [float(len(summary.split())) for summary in summaries]
    return Figures(name, _mean(rouge), _mean(scores), wins, _mean(words))


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of prompts on which ours is higher; a tie is half a win."""
    return _mean([(our > their) + 0.5 * (our == their) for our, their in zip(ours, theirs, strict=True)])


def best_of(summaries: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]) -> tuple[list[str], list[float]]:
    """The summary of each prompt that scores highest, and its score.

    Args:
        summaries, scores: [N][prompts]; the earlier one of two that score the same is taken.
    """
    chosen = [max(range(len(column)), key=column.__getitem__) for column in zip(*scores, strict=True)]
    return (
        [summaries[row][prompt] for prompt, row in enumerate(chosen)],
        [scores[row][prompt] for prompt, row in enumerate(chosen)],
    )


def table(rows: Sequence[Figures], title: str) -> Table:
    result = Table(title=title)
    for column in COLUMNS:
        result.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for row in rows:
        result.add_row(*row.cells)
    return result


def write(directory: Path, rows: Sequence[Figures], training: dict[str, Any]) -> None:
    """``figures.json`` and ``figures.md``; ``training``: what the training runs say of themselves."""
    figures = {"training": training, "held_out": [asdict(row) for row in rows]}
    (directory / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    lines = [COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1), *(row.cells for row in rows)]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    text += "\n" + "".join(f"- {name}: {value:.4g}\n" for name, value in training.items())
    (directory / "figures.md").write_text(text)


def last_metrics(run_directory: Path, names: Sequence[str]) -> dict[str, float]:
    """The last value of each of ``names`` in the run's metrics. Raises KeyError for one that it never logged."""
    found: dict[str, float] = {}
    for line in (run_directory / "metrics.jsonl").read_text().splitlines():
        found.update(json.loads(line))
    return {name: found[name] for name in names}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
