"""Workers for tests/test_spawn.py: what a rank may do to its launcher."""

from __future__ import annotations

import os
import time
from typing import Any

import torch


def sum_ranks(payload: dict[str, Any]) -> torch.Tensor:
    torch.distributed.init_process_group("gloo")
    total = payload["value"] + int(os.environ["RANK"])
    torch.distributed.all_reduce(total)
    return total


def rank_one_raises(payload: Any) -> None:
    torch.distributed.init_process_group("gloo")
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank one is broken")
    torch.distributed.barrier()


def dies(payload: Any) -> None:
    print("last words", flush=True)
    os._exit(7)


def sleeps(payload: Any) -> None:
    print("still waiting", flush=True)
    time.sleep(60)
