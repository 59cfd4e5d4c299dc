"""One self-contained HTML page of a run: curves, last values, samples, configuration.

Reads only what a run leaves in its directory (``metrics.jsonl``, ``rollouts/``, ``validation/``, ``values/``,
``config.yaml``) and imports no torch, so a report can be written on any machine, during a run or after a crash. Plots
are inline SVG.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_rlhf.cli.plots import Curve, Histogram, Panel, draw
from nemo_rlhf.cli.report_samples import rollouts_section, validation_section
from nemo_rlhf.cli.samples import VALUES, number, read_jsonl, sample_files
from nemo_rlhf.config.dumping import masked

PAGE_NAME = "report.html"

Series = dict[str, Curve]

# Panels in reading order: title, axis label, keys ("name/*" takes all that begin so).
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Reward", "score", ("reward/mean",)),
    ("KL to the reference", "nats", ("kl/mean",)),
    ("KL coefficient", "", ("kl/coef",)),
    ("Entropy", "nats per token", ("entropy/mean",)),
    ("Explained variance of values", "", ("value/explained_variance",)),
    ("Response length", "tokens", ("response_length/mean",)),
    ("Responses that ended", "share", ("eos/share",)),
    ("Responses that were cut", "share", ("truncated/share",)),
    ("Losses", "", ("loss", "loss/*")),
    ("Clipped share", "of tokens", ("clipfrac/*",)),
    ("Probability ratio", "", ("ratio/mean",)),
    ("Gradient norm", "", ("grad_norm", "grad_norm/*")),
    ("Learning rate", "", ("lr", "lr/*")),
    ("Tokens per second", "tokens/s", ("perf/*",)),
    ("Peak memory", "MiB", ("memory/*",)),
)
BANDS = {"reward/mean": "reward/std"}
UNPLOTTED = ("step", "check/", "time/total_s", "reward/std")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --paper: #fff; --faint: #6b747d; --line: #d9dee3; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --paper: #14181c; --faint: #98a2ac; --line: #323a42; --card: #1d2329; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
p.sub { color: var(--faint); margin: .2rem 0 1.2rem; }
.cards, .plots { display: grid; gap: .8rem; }
.cards { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
.card, figure { margin: 0; padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.card b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; } .card span { color: var(--faint); }
figcaption { font-weight: 600; } figure svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; width: 36%; } summary { cursor: pointer; margin: .4rem 0; }
.values { columns: 3 300px; } .values table { break-inside: avoid; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow: auto; }
"""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Raises ValueError when ``metrics.jsonl`` is missing, holds no step, or has a line that is no JSON object. A last
    line without its end, which a crash leaves behind, is ignored.
    """
    directory = Path(run_dir)
    metrics = directory / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{directory} is not a run directory: it has no metrics.jsonl.")
    series = _series(read_jsonl(metrics), metrics)
    page = _page(directory, series)
    path = directory / PAGE_NAME
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _series(rows: Sequence[Mapping[str, Any]], path: Path) -> Series:
    """Finite numbers of every metric by step. A step that was done twice, after a restart, counts the second time."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        step = row.get("step")
        if not isinstance(step, int):
            raise ValueError(f"{path} has a line without an integer step: {json.dumps(row)[:80]}.")
        for key, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                values.setdefault(key, {})[step] = float(value)
    if "step" not in values:
        raise ValueError(f"{path} has no steps yet: run at least one.")
    return {
        key: Curve(tuple(sorted(points)), tuple(points[s] for s in sorted(points))) for key, points in values.items()
    }


def panels(series: Series) -> list[Panel]:
    """What to draw of the metrics that are there: validation first, then ``PANELS``, times, and all the rest."""
    plottable = {key: curve for key, curve in series.items() if not key.startswith(UNPLOTTED)}
    found = _validation_panels(plottable)
    for title, label, patterns in PANELS:
        keys = [key for pattern in patterns for key in plottable if _matches(key, pattern)]
        if keys:
            curves = {_legend(key): plottable[key] for key in keys}
            band = series.get(BANDS.get(keys[0], ""))
            found.append(Panel(title, label, curves, band=band))
    times = {key[5:-2]: curve for key, curve in plottable.items() if re.fullmatch(r"time/.*_s", key)}
    if times:
        found.append(Panel("Time per step", "seconds", times, stacked=True))
    covered = {key for _, _, patterns in PANELS for key in plottable for p in patterns if _matches(key, p)}
    rest = [key for key in plottable if key not in covered and not key.startswith(("val/", "time/"))]
    return found + [Panel(key, "", {key: plottable[key]}) for key in rest]


def _validation_panels(series: Series) -> list[Panel]:
    """One panel a validation metric; the values of a sweep (``val/reward@temperature=0.7``) share one. Where a
    training metric has the same name (``val/loss`` and ``loss``), it is drawn with it."""
    grouped: dict[str, Series] = {}
    for key, curve in series.items():
        if key.startswith("val/"):
            name, _, variant = key[4:].partition("@")
            grouped.setdefault(name, {})[variant or "validation"] = curve
    found = []
    for name, curves in grouped.items():
        training = next((series[key] for key in (name, f"{name}/sft", f"train/{name}") if key in series), None)
        if training is not None:
            curves = {"training": training, **curves}
        found.append(Panel(f"Validation: {name}", "", curves))
    return found


def _matches(key: str, pattern: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def _legend(key: str) -> str:
    return key.partition("/")[2] or key


def _page(directory: Path, series: Series) -> str:
    name = html.escape(directory.resolve().name)
    steps = series["step"].steps
    figures = "\n".join(
        f"<figure><figcaption>{html.escape(panel.title)}</figcaption>{draw(panel)}</figure>" for panel in panels(series)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>{_STYLE}</style></head><body>
<h1>{name}</h1><p class="sub">{len(steps)} steps, the last is {steps[-1]}. {_duration(series)}</p>
<div class="cards">{_cards(series)}</div>
<h2>Curves</h2><div class="plots">{figures}</div>
{_values(directory)}
{rollouts_section(directory)}
{validation_section(directory)}
<h2>Last values</h2>{_last_values(series)}
{_config(directory)}
</body></html>
"""


def _duration(series: Series) -> str:
    total = sum(series["time/total_s"].values) if "time/total_s" in series else 0.0
    return f"{total / 60:.1f} minutes of training." if total else ""


def _cards(series: Series) -> str:
    wanted = [key for key in series if key.startswith("val/")][:4]
    wanted += ["reward/mean", "kl/mean", "response_length/mean", "loss", "time/total_s", "memory/peak_mib"]
    cards = []
    for key in wanted:
        if key in series:
            value = series[key].values
            first = f"from {number(value[0])}" if len(value) > 1 else "&nbsp;"
            cards.append(f"<div class='card'>{html.escape(key)}<b>{number(value[-1])}</b><span>{first}</span></div>")
    return "".join(cards)


def _last_values(series: Series) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td class='number'>{number(curve.values[-1])}</td>"
        f"<td class='number'>{curve.steps[-1]}</td></tr>"
        for key, curve in sorted(series.items())
        if key != "step"
    )
    return f"<table><tr><th>metric</th><th>value</th><th>at step</th></tr>{rows}</table>"


def _values(directory: Path) -> str:
    """What ILQL says of the actions in its data: distributions of Q, target Q and V, at first and at last."""
    found = {step: records for step, path in sample_files(directory, VALUES).items() if (records := read_jsonl(path))}
    if not found:
        return ""
    plots = []
    for step in sorted({min(found), max(found)}):
        records = found[step]
        counts = {str(record["name"]): tuple(record["counts"]) for record in records}
        title = f"Values at step {step}"
        histogram = Histogram(title, "value", tuple(records[0]["edges"]), counts)
        plots.append(f"<figure><figcaption>{title}</figcaption>{draw(histogram)}</figure>")
    return f"<h2>Values of the data's actions</h2><div class='plots'>{''.join(plots)}</div>"


def _config(directory: Path) -> str:
    path = directory / "config.yaml"
    if not path.is_file():
        return ""
    text = html.escape(masked(path.read_text(encoding="utf-8")))  # of a run that did not mask it
    return f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"
