"""Checkpoints that are written while training goes on: the same bytes, in order, and whole or not there."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nemo_rlhf.parallel import checkpoint
from tests.spawn import DistributedFailure, run_distributed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks have left, which killed themselves at the end."""
    directory = tmp_path_factory.mktemp("saving")
    with pytest.raises(DistributedFailure, match=r"died \(-9\)"):
        run_distributed("tests.workers.saving_worker:run", 2, str(directory), timeout_s=120)
    return directory


@pytest.fixture(scope="module")
def found(place: Path) -> list[dict[str, Any]]:
    return [json.loads((place / f"found_{rank}.json").read_text()) for rank in range(2)]


def files(directory: Path) -> dict[str, list[int]]:
    listed = json.loads((directory / "manifest.json").read_text())["files"]
    # but for what holds the directory's own name
    return {name: entry for name, entry in listed.items() if not name.endswith("/.metadata")}


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(place: Path, found: list[dict[str, Any]]) -> None:
    for rank in found:
        said = rank["snapshot"]
        assert said["early"] is False and said["there"] is False and said["polls"] > 1
        assert said["pending"] is None and said["again"] == [False, False]
    tensors = [name for name in files(place / "by_ranks") if name.endswith(".distcp")]
    assert len(tensors) >= 4  # one or two of each rank, of the model and of the optimizer
    assert files(place / "beside") == files(place / "by_ranks")


def test_the_optimizer_s_state_is_each_parameter_s_own(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["buckets"]["padded"] > 3
        assert rank["buckets"]["wrong"] == 0
    assert [rank["buckets"]["parameters"] for rank in found] == [8, 7]


def test_a_save_waits_for_the_one_before(place: Path, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["order"] == {"first": True, "pending": str(place / "second"), "waited": True}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("full disk", "No space left on device"),
        ("killed writer", "the process that wrote it ended with code -9"),
        ("late writer", "the process that wrote it had not finished after 1 s"),
    ],
)
def test_a_failure_is_every_rank_s_and_leaves_what_was_there(found: list[dict[str, Any]], how: str, words: str) -> None:
    (sentence, left), other = (rank["failures"][how] for rank in found)
    assert [sentence, left] == other
    assert "/first could not be written" in sentence and "rank 1" in sentence and words in sentence
    assert "earlier checkpoints are untouched" in sentence
    assert left == []


def test_a_killed_run_leaves_no_checkpoint_and_no_writer(place: Path) -> None:
    assert not (place / "killed").exists()
    (place / "never").touch()  # what writers that live on would wait for
    time.sleep(0.3)
    assert list((place / "killed.partial").rglob("*.distcp")) == []


# ---- what several ranks hold, one of them writes and reads

WAYS = ("in the foreground", "in the background")
CUTS = ("DP4", "TP2 x DP2", "DP4, EP2", "TP2 x DP2, EP1")
PARTS = {"model/weights": 2, "optimizer": 4}  # bytes of an element


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("sharing")
    return run_distributed("tests.workers.sharing_worker:run", 4, str(directory), timeout_s=240)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", CUTS)
def test_every_rank_writes_its_share(shared: list[dict[str, Any]], cut: str, way: str) -> None:
    """The largest tensors go first, each to the rank with the least, so no rank has more than its share and one
    tensor; pickling takes some bytes for each of them."""
    found = shared[0][cut][way]
    for part, itemsize in PARTS.items():
        sizes = found["sizes"][part]
        assert min(sizes) > 0
        assert max(sizes) <= sum(sizes) / 4 + shared[0][cut]["largest"] * itemsize + 2048 * found["tensors"][part] / 4
    assert found["sizes"] == shared[0][cut][WAYS[0]]["sizes"]


@pytest.mark.parametrize("cut", CUTS)
def test_no_rank_gathers_what_it_does_not_write(shared: list[dict[str, Any]], cut: str) -> None:
    for when, hosted in zip(
        ("saving", "loading"), zip(*(rank[cut]["hosted"] for rank in shared), strict=True), strict=True
    ):
        assert max(hosted) <= sum(hosted) / 4 + shared[0][cut]["largest"] * 4, when
        # what tensor-parallel ranks hold alike, each of them reads and one writes
        written = sum(shared[0][cut][WAYS[0]]["sizes"]["optimizer"])
        assert 0.9 * written < sum(hosted) < (1.0 if when == "saving" else 1.05) * written, when


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", CUTS)
def test_nothing_is_read_back_for_its_checksum(shared: list[dict[str, Any]], cut: str, way: str) -> None:
    """But for small files that rank 0 writes in other ways."""
    for number, rank in enumerate(shared):
        found = rank[cut][way]
        written = sum(sizes[number] for sizes in found["sizes"].values())
        assert found["saved"]["wchar"] > written  # so the processes that write are counted
        assert found["saved"]["rchar"] < found["rest"] + (1 << 17) < written / 10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", CUTS)
def test_every_rank_reads_its_share(shared: list[dict[str, Any]], cut: str, way: str) -> None:
    """torch goes back and forth within a tensor's file, and reads a buffer each time: less than 64 KiB in all."""
    whole = shared[0][cut][way]
    share = sum(sum(sizes) for sizes in whole["sizes"].values()) / 4
    largest = sum(shared[0][cut]["largest"] * itemsize for itemsize in PARTS.values())
    tensors = sum(whole["tensors"].values()) / 4
    for rank in shared:
        found = rank[cut][way]["loaded"]["rchar"]
        assert share < found < share + largest + (tensors + 2) * (1 << 16) + 4 * whole["rest"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", CUTS)
def test_what_is_resumed_is_what_was_saved(shared: list[dict[str, Any]], cut: str, way: str) -> None:
    for rank in shared:
        assert rank[cut][way]["resumed"] > 25 and rank[cut][way]["differ"] == []


@pytest.mark.parametrize("cut", CUTS)
def test_everyone_s_tensors_are_looked_at_once_a_run(shared: list[dict[str, Any]], cut: str) -> None:
    for rank in shared:
        assert [rank[cut][way]["looks"] for way in WAYS] == [2, 0]  # of the model and of the optimizer


@pytest.mark.parametrize(
    "lost",
    [
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer"),
    ],
)
def test_a_lost_connection_is_no_failure_to_write(
    lost: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint, "_turns", itertools.count())

    def lose() -> None:
        raise lost

    def save() -> None:
        with checkpoint.told_as_save_error(tmp_path / "step_1"):
            checkpoint.together(lose, tmp_path)

    with pytest.raises(type(lost)) as told:
        save()
    assert told.value is lost
    store.set(
        "nemo_rlhf/together/1", "rank 1: No space left on device"
    )  # and then it ended, and with it the connection
    with pytest.raises(checkpoint.SaveError, match="rank 1: No space left on device"):
        save()


def test_a_checkpoint_that_only_a_newer_megatron_reads_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no common\.pt: it is damaged, or megatron-core 0\.19 or newer wrote it"):
        checkpoint.load_tensors({}, tmp_path)
