"""A model of which some layers do not learn: its optimizer is saved and goes on like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.spawn import run_distributed

WORKER = "tests.workers.frozen_worker:run"


@pytest.mark.parametrize(("world_size", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_an_optimizer_of_the_last_layers_goes_on(world_size: int, pp: int, tmp_path: Path) -> None:
    results: list[dict[str, Any]] = run_distributed(WORKER, world_size, {"pp": pp, "path": str(tmp_path / "saved")})
    for rank in results:
        assert rank["uninterrupted"].keys() == rank["resumed"].keys()
        for name, weight in rank["uninterrupted"].items():
            assert torch.equal(weight, rank["resumed"][name]), name
    assert any(rank["moved"] for rank in results) and all(rank["frozen"] == [] for rank in results)
