"""The documentation names every key, and nothing that is not there."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from nemo_rlhf.config.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent


def keys(schema: type, prefix: str = "") -> set[str]:
    hints = get_type_hints(schema)
    found: set[str] = set()
    for field in fields(schema):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        found |= keys(kind, f"{name}.") if is_dataclass(kind) else {name}
    return found


def test_every_key_is_documented_once() -> None:
    documented = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == set().union(*(keys(schema) for schema in COMMANDS.values()))


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
