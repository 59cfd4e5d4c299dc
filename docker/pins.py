"""Keeps the compiled packages of a base image as they are: PyTorch and all that was built against it.

    python3 pins.py write FILE     # constraints for pip: what is installed, one name==version a line
    python3 pins.py check FILE     # exit code 1 where another version, or none, is installed now

Needs nothing but Python, as it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

# numpy too: compiled packages were built against its binary interface
COMPILED = re.compile(
    r"torch|torchvision|torchaudio|(pytorch-)?triton|torch-tensorrt|apex|flash-attn.*|transformer-engine.*|"
    r"nvidia-.*|cuda-.*|cupy.*|numpy"
)


def installed_pins(names: Iterable[tuple[str | None, str]]) -> list[str]:
    """``name==version`` of the compiled ones among (name, version) pairs, sorted, each once.

    What has no name was left behind by a removal that was broken off: pip does not see it either.
    """
    plain = ((re.sub(r"[-_.]+", "-", name).lower(), found) for name, found in names if name)
    return sorted({f"{name}=={found}" for name, found in plain if COMPILED.fullmatch(name)})


def changed(pins: Iterable[str]) -> list[str]:
    """A sentence for each of them that no longer holds."""
    said = []
    for pin in pins:
        name, _, expected = pin.partition("==")
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "nothing"
        if found != expected:
            said.append(f"{name} {expected} of the base image was replaced by {found}.")
    return said


def main(action: str, file: Path) -> int:
    if action == "write":
        pins = installed_pins((found.metadata["Name"], found.version) for found in distributions())
        if not any(pin.startswith("torch==") for pin in pins):
            print("The base image has no PyTorch.", file=sys.stderr)
            return 1
        file.write_text("".join(f"{pin}\n" for pin in pins))
        return 0
    said = changed(file.read_text().split())
    print("\n".join(said), file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
