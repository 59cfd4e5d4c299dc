"""The launcher of distributed tests reports what its ranks return, and why they fail."""

from __future__ import annotations

import pytest
import torch

from tests.spawn import DistributedFailure, run_distributed

WORKER = "tests.workers.spawn_worker"


def test_results_come_back_by_rank() -> None:
    results = run_distributed(f"{WORKER}:sum_ranks", 2, {"value": torch.tensor([1, 2])}, timeout_s=120)
    assert [result.tolist() for result in results] == [[3, 5], [3, 5]]


def test_the_first_failing_rank_is_named() -> None:
    with pytest.raises(DistributedFailure, match=r"(?s)Rank 1 of 2 raised first.*rank one is broken"):
        run_distributed(f"{WORKER}:rank_one_raises", 2, timeout_s=120)


def test_a_dead_rank_is_named_with_its_output() -> None:
    with pytest.raises(DistributedFailure, match=r"(?s)Rank 0 of 1 died \(7\).*last words"):
        run_distributed(f"{WORKER}:dies", 1, timeout_s=120)


def test_a_late_rank_is_named_and_killed() -> None:
    with pytest.raises(DistributedFailure, match=r"(?s)Rank 0 of 1 was still running after 2 s.*still waiting"):
        run_distributed(f"{WORKER}:sleeps", 1, timeout_s=2)
