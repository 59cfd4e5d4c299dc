"""Curves of a run as inline SVG, drawn by matplotlib without a display, in colours that light and dark pages share."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_POINTS = 600
_COLOURS = ("#3b82c4", "#e0813a", "#3fa66a", "#c9504f", "#9070c8", "#b58a2e", "#c463a5", "#5aa7b0")
_GREY = "#87909a"


@dataclass(frozen=True)
class Curve:
    """Values of one metric; ``steps`` rise."""

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """One plot: curves by the name that the legend shows. ``band`` is the standard deviation of the first one;
    ``stacked`` piles the curves on one another."""

    title: str
    label: str
    curves: Mapping[str, Curve]
    band: Curve | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Histogram:
    """Distributions of several quantities over the same bins: counts by the name that the legend shows; ``edges`` has
    one more."""

    title: str
    label: str
    edges: tuple[float, ...]
    counts: Mapping[str, tuple[float, ...]]


def draw(panel: Panel | Histogram) -> str:
    """The panel as an ``<svg>`` element whose ids are its own, so that many fit in one page."""
    salt = hashlib.sha256(repr(panel.title).encode()).hexdigest()[:12]
    style: dict[Any, Any] = {
        "svg.hashsalt": salt,
        "svg.fonttype": "none",
        "text.parse_math": False,  # names are people's, and may have two $
        "font.size": 9,
        "text.color": _GREY,
        "axes.labelcolor": _GREY,
        "axes.edgecolor": _GREY,
        "xtick.color": _GREY,
        "ytick.color": _GREY,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=_COLOURS)
        names = panel.counts if isinstance(panel, Histogram) else panel.curves
        if isinstance(panel, Histogram):
            _bins(axes, panel)
        else:
            _curves(axes, panel)
        axes.grid(color=_GREY, alpha=0.2, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            figure.legend(frameon=False, fontsize=8, loc="outside upper left", ncols=4, columnspacing=1.2)
        buffer = io.StringIO()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return _own_ids(text[text.index("<svg") :], salt)


def _own_ids(svg: str, salt: str) -> str:
    """Ids that matplotlib numbers anew in every figure ("axes_1") would meet each other in the page."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{salt}-', svg)
    svg = re.sub(r'href="#', f'href="#{salt}-', svg)
    return svg.replace("url(#", f"url(#{salt}-")


def _curves(axes: Axes, panel: Panel) -> None:
    if panel.stacked:
        _stack(axes, panel.curves)
    else:
        _lines(axes, panel)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _bins(axes: Axes, panel: Histogram) -> None:
    for name, counts in panel.counts.items():
        shares = np.asarray(counts, dtype=float) / max(1.0, sum(counts))
        axes.stairs(shares, panel.edges, label=name, linewidth=1.4)
    axes.set_xlabel(panel.label)
    axes.set_ylabel("share")


def _lines(axes: Axes, panel: Panel) -> None:
    for index, (name, curve) in enumerate(panel.curves.items()):
        steps, values = thinned(curve)
        # Few points, as of validation, are seen better with marks.
        axes.plot(steps, values, label=name, linewidth=1.6, marker="o" if len(steps) < 20 else "", markersize=3)
        if index == 0 and panel.band is not None:
            deviation = np.interp(steps, panel.band.steps, panel.band.values)
            axes.fill_between(steps, values - deviation, values + deviation, alpha=0.15, linewidth=0)


def _stack(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Curves on one another. A step that one of them lacks counts 0 there."""
    steps = sorted({step for curve in curves.values() for step in curve.steps})
    piled = []
    for curve in curves.values():
        points = dict(zip(curve.steps, curve.values, strict=True))
        piled.append(thinned(Curve(tuple(steps), tuple(points.get(step, 0.0) for step in steps))))
    axes.stackplot(piled[0][0], [values for _, values in piled], labels=list(curves), alpha=0.8)


def thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, averaged over neighbours where there are more than ``MAX_POINTS``."""
    steps, values = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
    if len(steps) <= MAX_POINTS:
        return steps, values
    pieces = (np.array_split(array, MAX_POINTS) for array in (steps, values))
    thin_steps, thin_values = (np.array([piece.mean() for piece in split]) for split in pieces)
    return thin_steps, thin_values
