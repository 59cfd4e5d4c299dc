"""What every refresh of the reward model saw, one file each: with the first weights, the same model comes again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_rlhf.parallel import checkpoint


class RefreshFiles:
    """``refresh_N.json`` in a directory. All ranks call its functions, rank 0 writes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, number: int, record: dict[str, Any]) -> None:
        path = self.directory / f"refresh_{number}.json"

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"number": number, **record}, indent=1) + "\n")
            partial.replace(path)

        checkpoint.on_rank_zero(write)

    def rewind(self, number: int) -> None:
        """Remove the files after this one: the run went on from before them, and does them again in its own way."""

        def remove() -> None:
            for path in self.directory.glob("refresh_*.json"):
                found = path.stem.removeprefix("refresh_")
                if found.isdecimal() and int(found) > number:
                    path.unlink()

        checkpoint.on_rank_zero(remove)
