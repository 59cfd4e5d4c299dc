"""The part of the report that shows what a model wrote: samples of training, and of the last validation."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rlhf.cli.samples import ROLLOUTS, VALIDATION, Record, cut_text, number, read_jsonl, sample_files, spread

NUM_SAMPLES = 12
MAX_CHARACTERS = 1500

# Figures of a sample that have a column where any sample has them: key, heading.
_FIGURES = (("score", "score"), ("kl", "KL"), ("advantage", "advantage"))


def rollouts_section(run_dir: Path) -> str:
    """Samples of the first, the middle and the last step; empty where the run has none."""
    files = sample_files(run_dir, ROLLOUTS)
    if not files:
        return ""
    steps = list(files)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    parts = []
    for step in chosen:
        records = read_jsonl(files[step])
        shown = spread(records, NUM_SAMPLES)
        summary = f"Step {step} ({len(shown)} of {len(records)})"
        parts.append(_folded(summary, _table(shown), is_open=step == chosen[-1]))
    return f"<h2>Samples</h2>{''.join(parts)}"


def validation_section(run_dir: Path) -> str:
    """Samples of the last validation, one table for each way of sampling; empty where there was none."""
    files = sample_files(run_dir, VALIDATION)
    if not files:
        return ""
    step = max(files)
    variants: dict[str, list[Record]] = {}
    for record in read_jsonl(files[step]):
        variants.setdefault(str(record.get("sampling", "")), []).append(record)
    parts = []
    for place, (name, records) in enumerate(variants.items()):
        shown = spread(records, NUM_SAMPLES)
        scores = [record["score"] for record in records if isinstance(record.get("score"), (int, float))]
        mean = f", mean score {number(sum(scores) / len(scores))}" if scores else ""
        parts.append(
            _folded(f"{name or 'validation'} ({len(shown)} of {len(records)}{mean})", _table(shown), is_open=place == 0)
        )
    return f"<h2>Validation samples of step {step}</h2>{''.join(parts)}"


def _folded(summary: str, content: str, is_open: bool) -> str:
    return f"<details{' open' if is_open else ''}><summary>{html.escape(summary)}</summary>{content}</details>"


def _table(records: Sequence[Record]) -> str:
    figures = [(key, head) for key, head in _FIGURES if any(key in record for record in records)]
    scores = [record.get("scores") for record in records]
    sources = list(dict.fromkeys(name for one in scores if isinstance(one, dict) for name in one))
    heads = ["prompt", "response", *(head for _, head in figures), *sources, "end", "tokens"]
    rows = []
    for record in records:
        of_source = record.get("scores") if isinstance(record.get("scores"), dict) else {}
        assert isinstance(of_source, dict)
        numbers = [record.get(key) for key, _ in figures] + [of_source.get(name) for name in sources]
        rows.append(
            f"<tr><td class='text'>{_text(record.get('prompt'), keep_end=True)}</td>"
            f"<td class='text'>{_text(record.get('response'))}</td>"
            + "".join(f"<td class='number'>{number(value)}</td>" for value in numbers)
            + f"<td>{_text(record.get('finish_reason'))}</td>"
            f"<td class='number'>{number(record.get('num_tokens'))}</td></tr>"
        )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _text(value: Any, keep_end: bool = False) -> str:
    return html.escape(cut_text(value, MAX_CHARACTERS, keep_end))
