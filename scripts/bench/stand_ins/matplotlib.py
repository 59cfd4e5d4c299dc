"""Stands for matplotlib where scripts/gpu_check.sh runs: reports of its runs, which nobody reads, have empty curves.

With Pillow and fonts it would be 25 MB of wheels.
"""

import sys
from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock


class FigureCanvasSVG:
    def __init__(self, figure: Any) -> None:
        pass

    def print_svg(self, file: Any, **_: Any) -> None:
        file.write("<svg/>")


def rc_context(settings: Any) -> Any:
    return nullcontext()


for _name in ("axes", "colors", "backends", "backends.backend_svg", "figure", "pyplot", "style", "ticker"):
    sys.modules[f"{__name__}.{_name}"] = MagicMock(FigureCanvasSVG=FigureCanvasSVG)
axes, colors, pyplot, style = (sys.modules[f"{__name__}.{_name}"] for _name in ("axes", "colors", "pyplot", "style"))
