"""Samples that a run has left in its directory, for people to look at: which ones, and as a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nemo_rlhf.untrusted import parse_json

ROLLOUTS, VALIDATION, VALUES = "rollouts", "validation", "values"
MAX_CHARACTERS = 300

Record = Mapping[str, Any]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file. Raises ValueError with the number of the first bad line; only a last line that was
    cut off in the middle passes, and is left out."""
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, "the line")
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not valid JSON: repair or remove the line.") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is not a JSON object: repair or remove the line.")
        rows.append(row)
    return rows


def sample_files(run_dir: Path, place: str) -> dict[int, Path]:
    """``<place>/step_N.jsonl`` by step, the first step first."""
    files = {int(p.stem[5:]): p for p in (run_dir / place).glob("step_*.jsonl") if p.stem[5:].isdigit()}
    return dict(sorted(files.items()))


def spread(records: Sequence[Record], number: int) -> list[Record]:
    """At most ``number`` of them, evenly over the whole: those of one prompt lie side by side."""
    number = min(number, len(records))
    return [records[place * len(records) // number] for place in range(number)]


def cut_text(value: Any, length: int, keep_end: bool = False) -> str:
    """``value`` as at most ``length`` characters; of a long prompt the end says more than the beginning."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= length:
        return text
    return "…" + text[-length:] if keep_end else text[:length] + "…"


def number(value: Any) -> str:
    """A number as people read it; empty for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if abs(value) < 1e7 and float(value).is_integer():
        return f"{int(value)}"
    return f"{value:.4g}" if isinstance(value, float) or abs(value) < 1e300 else f"{str(value)[:20]}…"


def samples_table(records: Sequence[Record], title: str) -> Table:
    """A table for the terminal. What a model wrote may hold control characters and markup: it is shown, not obeyed."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_lines=True, expand=True)
    for name, ratio in (("prompt", 2), ("response", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    figures = [name for name in ("score", "kl", "advantage") if any(name in record for record in records)]
    for name in (*figures, "end"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        texts = (
            cut_text(record.get("prompt"), MAX_CHARACTERS, keep_end=True),
            cut_text(record.get("response"), MAX_CHARACTERS),
        )
        cells = [Text(visible(text)) for text in texts]
        cells += [Text(number(record.get(name))) for name in figures]
        table.add_row(*cells, Text(visible(cut_text(record.get("finish_reason"), 20))))
    return table


def visible(text: str) -> str:
    """``text`` with escapes for what is not printable: an escape sequence would steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
