"""SFT in full: packed rows learn what padded ones do, epochs end a run, the best records and checkpoints are kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.data.order import Stream
from nemo_rlhf.data.texts import read_texts
from nemo_rlhf.data.tokenizer import load_tokenizer
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.packing import fill_rows, join_row, positions_of
from tests.conftest import Tiny
from tests.jobs import metrics_of
from tests.spawn import run_distributed
from tests.test_families import make_model
from tests.test_models import TOLERANCE, llamas  # noqa: F401
from tests.workers import sft_worker as worker
from tests.workers.parallel_worker import Cut

CUTS = {"TP1": Cut(), "DP2": Cut(), "TP2": Cut(tp=2), "TP2+SP": Cut(tp=2, sequence_parallel=True), "PP2": Cut(pp=2)}
FAMILIES = ("llama", "gpt2", "mistral")  # rotary, learned positions, a window that most texts are longer than


@pytest.fixture(scope="module")
def directories(llamas: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    root = tmp_path_factory.mktemp("packed")
    for name in FAMILIES[1:]:
        make_model(name).save_pretrained(root / name)
    return {"llama": llamas["tied"]} | {name: root / name for name in FAMILIES[1:]}


def jobs(directories: dict[str, Path], labels: tuple[str, ...], packed: bool) -> dict[str, Any]:
    return {
        f"{label}/{name}": (CUTS[label], {"directory": directory, "packed": packed})
        for label in labels
        for name, directory in directories.items()
    }


@pytest.fixture(scope="module")
def padded(directories: dict[str, Path]) -> dict[str, Any]:
    """In rows of their own, in one process: what tests/test_models.py holds against transformers."""
    state.set_environment_for_one_process()
    return worker.run(jobs(directories, ("TP1",), packed=False))


@pytest.fixture(scope="module")
def packed(directories: dict[str, Path], padded: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By job, of each rank."""
    one = jobs(directories, ("TP1",), packed=True)
    for recompute in ("selective", "full"):
        arguments = {"directory": directories["llama"], "packed": True, "recompute": recompute}
        one[f"{recompute}/llama"] = (CUTS["TP1"], arguments)
    here = worker.run(one)
    two = run_distributed("tests.workers.sft_worker:run", 2, jobs(directories, ("DP2", "TP2", "TP2+SP", "PP2"), True))
    return {name: [result] for name, result in here.items()} | {name: [rank[name] for rank in two] for name in two[0]}


# ---- packing


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("label", ["TP1", "selective", "full", "DP2", "TP2", "TP2+SP", "PP2"])
def test_packed_texts_learn_what_padded_ones_do(padded: Any, packed: Any, label: str, name: str) -> None:
    if f"{label}/{name}" not in packed:
        pytest.skip("recomputation is tried on one family")
    expected = padded[f"TP1/{name}"]
    for result in packed[f"{label}/{name}"]:
        torch.testing.assert_close(result["logprobs"], expected["logprobs"], **TOLERANCE)
        for actual, wanted in zip(result["steps"], expected["steps"], strict=True):
            for key in ("loss", "norm"):
                torch.testing.assert_close(torch.tensor(actual[key]), torch.tensor(wanted[key]), **TOLERANCE)
        assert result["rows"] == (4 if label != "DP2" else 2)
        if label.startswith("TP2"):
            continue  # weights are shares there: the norm and the second step's loss speak for them
        for key, weight in result["weights"].items():
            if weight.shape == expected["weights"].get(key, weight).shape and key in expected["weights"]:
                torch.testing.assert_close(weight, expected["weights"][key], rtol=1e-4, atol=2e-5, msg=key)


def test_rows_are_filled_and_shared() -> None:
    lengths = [24, 5, 17, 9, 23, 12, 3, 31]
    for multiple_of in (1, 2, 3, 8, 16):
        rows = fill_rows(lengths, 40, multiple_of)
        assert sorted(index for row in rows for index in row) == list(range(8))
        assert all(sum(lengths[index] for index in row) <= 40 for row in rows)
        assert len(rows) % multiple_of == 0 or len(rows) == 8
    assert len(fill_rows(lengths, 40, 1)) == 4


def test_a_joined_row_says_where_its_texts_are() -> None:
    tokens, lengths = torch.arange(12).view(3, 4), torch.tensor([4, 1, 2])
    row, places, bounds = join_row(tokens, lengths, [2, 0], multiple_of=4)
    assert row.tolist() == [[8, 9, 0, 1, 2, 3, 0, 0]]
    assert places.tolist() == [8, 9, 0, 1, 2, 3]
    assert bounds.tolist() == [0, 2, 6, 8]
    assert positions_of(bounds).tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]]
