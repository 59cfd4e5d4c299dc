"""SFT in full: packed rows learn what padded ones do, epochs end a run, the best records and checkpoints are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_rlhf.cli import main
from nemo_rlhf.data.order import Stream
from nemo_rlhf.data.texts import read_texts
from nemo_rlhf.data.tokenizer import load_tokenizer
from nemo_rlhf.parallel import state
from nemo_rlhf.parallel.packing import fill_rows, join_row, packed_texts
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


CASES = [(label, name) for label in CUTS for name in FAMILIES] + [("selective", "llama"), ("full", "llama")]


@pytest.mark.parametrize(("label", "name"), CASES)
def test_packed_texts_learn_what_padded_ones_do(padded: Any, packed: Any, label: str, name: str) -> None:
    expected = padded[f"TP1/{name}"]
    for result in packed[f"{label}/{name}"]:
        torch.testing.assert_close(result["logprobs"], expected["logprobs"], **TOLERANCE)
        for actual, wanted in zip(result["steps"], expected["steps"], strict=True):
            for key in ("loss", "norm"):
                torch.testing.assert_close(torch.tensor(actual[key]), torch.tensor(wanted[key]), **TOLERANCE)
        assert result["rows"] == (4 if label != "DP2" else 2)
        if label in ("TP1", "selective", "full", "PP2"):  # elsewhere ranks hold shares: the norm speaks for them
            for key, gradient in result["gradients"].items():
                if key in expected["gradients"]:  # not the last stage's copy of a tied embedding
                    torch.testing.assert_close(gradient, expected["gradients"][key], **TOLERANCE)


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
    packing = packed_texts(bounds)
    assert packing.positions.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1]] and packing.sizes == (2, 4, 2)


# ---- whole runs, in this process


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """Ten records with rewards 0 to 9 in disorder, in each of the forms."""
    rewards = [3, 9, 0, 7, 1, 8, 2, 6, 4, 5]
    records = [{"prompt": "a ", "response": "b" * (reward + 1), "reward": reward} for reward in rewards]
    records[1] = {"turns": ["a ", "bb", " c ", "b" * 8], "rewards": [4.5, 4.5]}
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_only_the_best_records_are_learned(tiny: Tiny, scored: Path) -> None:
    tokenizer = load_tokenizer(tiny.hf)

    def lengths(percent: float) -> list[int]:
        texts = read_texts(str(scored), tokenizer, 64, "response", top_percent=percent)
        return [sum(text.loss_mask) - 1 for text in texts]  # without EOS

    assert lengths(30) == [10, 8, 9]  # in the file's order
    assert lengths(1) == [10]
    assert lengths(21) == [10, 8, 9], "a share of a record counts as one"
    assert len(lengths(100)) == 10
    with pytest.raises(ValueError, match=r'line 1 has no field "reward" or "rewards"'):
        read_texts(str(tiny.train), tokenizer, 64, "response", top_percent=50)
    assert len(read_texts(str(tiny.train), tokenizer, 64, "response")) == 13


def test_epochs_say_how_long_a_run_is() -> None:
    stream = Stream(list(range(13)), 8, seed=1)
    assert [stream.num_steps(epochs) for epochs in (1, 2, 8)] == [2, 4, 13]
    visited = [record for step in range(stream.num_steps(2)) for record in stream.batch(step)]
    assert min(visited.count(record) for record in range(13)) == 2


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Padded and packed runs of two epochs, and one that keeps its best checkpoints."""
    root = tmp_path_factory.mktemp("sft")
    epochs = ("trainer.max_epochs=2", "data.max_sequence_length=24", "trainer.enable_progress_bar=false")
    params = "exp_manager.checkpoint_callback_params"
    best = (f"{params}.save_top_k=2", f"{params}.save_last_k=1", f"{params}.mode=max", "model.optim.lr=3e-2")
    for name, more in {"padded": epochs, "packed": (*epochs, "data.packing=true")}.items():
        assert main(tiny.sft(root / name, *more)) == 0
    with_bad = root / "with_bad.jsonl"
    with_bad.write_text(tiny.train.read_text() + '{"prompt": "a", "response": ""}\n{broken\n')
    skip = (f"data.train={with_bad}", "data.on_error=skip")
    assert main(tiny.sft(root / "best", *best, *skip, "trainer.max_steps=6", "trainer.val_check_interval=1")) == 0
    return root


def test_a_packed_run_logs_what_a_padded_one_does(runs: Path) -> None:
    padded, packed = metrics_of(runs / "padded"), metrics_of(runs / "packed")
    assert len(padded) == len(packed) == 5, "two epochs of 13 texts are 4 steps of 8, and validation before"
    for one, other in zip(padded, packed, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_records_that_are_left_out_are_counted(runs: Path) -> None:
    assert {row.get("data/skipped") for row in metrics_of(runs / "best") if row["step"]} == {2.0}
    assert not any("data/skipped" in row for row in metrics_of(runs / "padded"))


def test_the_best_checkpoints_stay_beside_the_last(runs: Path) -> None:
    losses = {row["step"]: row["val/loss"] for row in metrics_of(runs / "best") if row["step"]}
    best = sorted(losses, key=lambda step: losses[step], reverse=True)[:2]  # mode=max: the least learned
    stored = {path.name for path in (runs / "best" / "checkpoints").glob("step_*")}
    assert stored == {f"step_{step}" for step in {*best, 6}}
    assert (runs / "best" / "checkpoints" / "best").resolve().name == f"step_{best[0]}"
