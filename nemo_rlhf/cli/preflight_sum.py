"""The sums of the pre-flight step: of all processes, and, where that fails, of each node with the first."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

REDUCE_S = 60.0  # for each all-reduce of everybody
PAIR_S = 10.0  # for one of two nodes
WORDS_S = 3.0  # for the others' words once one has failed: attempts that hang give up within 2 s of each other
_NUMBERS = 2**24  # in the tensor that is summed, 64 MiB, on GPUs: enough to use every link
_GLOO = "set GLOO_SOCKET_IFNAME in slurm.environment to the interface that joins the nodes"
Store = Any


class Reduction:
    """An all-reduce of every process, and, where that fails, of each node with the first, to find the bad one.

    Everybody sums over gloo, as the program does for what lives on hosts, and with GPUs over NCCL, too. Pairs sum over
    gloo only: NCCL may still hang in the all-reduce that failed.
    """

    def __init__(self, store: Store, rank: int, world: int, on_gpus: bool) -> None:
        self._store, self._rank, self._world, self._on_gpus = store, rank, world, on_gpus
        self._limit_s = REDUCE_S * (2 if on_gpus else 1)

    def follow(self, node: str, local: int) -> int:
        """The part of every process but the first; returns its exit code."""
        store, pair = self._store, f"pair/{node}"
        everybody: _Attempt | None = None
        while not store.check(["verdict"]):
            if everybody is None and store.check(["reduce"]):
                everybody = _Attempt(self._everybody, self._limit_s)
            if everybody is not None and everybody.is_over():
                store.set(f"reduced/{self._rank}", everybody.said or "ok")
            if local == 0 and store.check([pair]) and not store.check([f"{pair}/done"]):
                store.set(f"{pair}/done", _Attempt(partial(self._pair, node, 1), PAIR_S).wait() or "ok")
            time.sleep(0.05)
        verdict: bytes = store.get("verdict")
        store.add("farewells", 1)
        return int(verdict != b"good")

    def lead(self, found: list[dict[str, Any]]) -> list[str]:
        """The part of the first process; returns what is wrong."""
        self._store.set("reduce", "1")
        mine = _Attempt(self._everybody, self._limit_s)
        deadline = time.monotonic() + self._limit_s + 5
        said: dict[int, str] = {}
        while len(said) < self._world and time.monotonic() < deadline:
            self._listen(mine, said)
            if any(word != "ok" for word in said.values()):
                break  # the others may wait for it for long
            time.sleep(0.05)
        if len(said) == self._world and set(said.values()) == {"ok"}:
            return []
        deadline = time.monotonic() + WORDS_S
        if bad := self._bad_pairs(found):
            return bad
        self._listen(mine, said)
        while len(said) < self._world and time.monotonic() < deadline:
            time.sleep(0.05)
            self._listen(mine, said)
        return [self._who_failed(found, said)]

    def _listen(self, mine: _Attempt, said: dict[int, str]) -> None:
        """Add what processes have said of the all-reduce since."""
        if 0 not in said and mine.is_over():
            said[0] = mine.said or "ok"
        for rank in range(1, self._world):
            if rank not in said and self._store.check([f"reduced/{rank}"]):
                said[rank] = self._store.get(f"reduced/{rank}").decode()

    def _bad_pairs(self, found: list[dict[str, Any]]) -> list[str]:
        """Complaints on the nodes that cannot sum with the first."""
        first, bad = found[0]["node"], []
        for node in dict.fromkeys(one["node"] for one in found if one["node"] != first):
            self._store.set(f"pair/{node}", "1")
            pair = _Attempt(partial(self._pair, node, 0), PAIR_S)
            while not pair.is_over() and not self._store.check([f"pair/{node}/done"]):
                time.sleep(0.02)
            theirs = self._store.get(f"pair/{node}/done").decode() if not pair.is_over() else "ok"
            if (why := pair.wait() if theirs == "ok" else theirs) is not None:
                bad.append(f"{node} and {first} cannot sum a tensor over the network ({why}): {_GLOO}")
        return bad

    def _who_failed(self, found: list[dict[str, Any]], said: dict[int, str]) -> str:
        """Of the nodes that failed, where others did not; a bad one makes all fail before long, and the first to fail
        may be an innocent one."""
        failed = {rank: word for rank, word in said.items() if word != "ok"}
        everywhere = list(dict.fromkeys(one["node"] for one in found))
        ranks = failed or [rank for rank in range(len(found)) if rank not in said]
        nodes = list(dict.fromkeys(found[rank]["node"] for rank in ranks))
        why = next(iter(failed.values()), f"no end within {self._limit_s:g} s")
        if len(nodes) < len(everywhere) or len(everywhere) == 1:
            return f"the all-reduce of all failed on {', '.join(nodes)} ({why})"
        return (
            f"the all-reduce of all failed on every node, and no single one was found to be at fault: each reaches "
            f"{everywhere[0]} over its host's network (heard first, from {nodes[0]}: {why})"
        )

    def wait_for_farewells(self, count: int) -> None:
        """The store ends with this process: let the others read the verdict first."""
        deadline = time.monotonic() + PAIR_S
        while self._store.add("farewells", 0) < count and time.monotonic() < deadline:
            time.sleep(0.02)

    def _everybody(self) -> None:
        try:
            _sum_on_hosts(dist.PrefixStore("hosts", self._store.clone()), self._rank, self._world, REDUCE_S)
        except RuntimeError as error:
            raise RuntimeError(f"gloo: {error}") from None
        if self._on_gpus:
            self._on_devices()

    def _on_devices(self) -> None:
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # raise when it takes too long
        torch.cuda.set_device(int(os.environ["SLURM_LOCALID"]) % torch.cuda.device_count())
        store, limit = dist.PrefixStore("devices", self._store.clone()), timedelta(seconds=REDUCE_S)
        dist.init_process_group("nccl", store=store, rank=self._rank, world_size=self._world, timeout=limit)
        numbers = torch.ones(_NUMBERS, device="cuda")
        dist.all_reduce(numbers)
        torch.cuda.synchronize()
        _check_sum(float(numbers[-1]), self._world)

    def _pair(self, node: str, place: int) -> None:
        _sum_on_hosts(dist.PrefixStore(f"pair/{node}/group", self._store.clone()), place, 2, PAIR_S)


def _sum_on_hosts(store: Store, rank: int, world: int, limit_s: float) -> None:
    group: Any = dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=limit_s))
    numbers = torch.ones(2**18)
    group.allreduce([numbers]).wait()
    _check_sum(float(numbers[-1]), world)


def _check_sum(found: float, expected: int) -> None:
    if found != expected:
        raise RuntimeError(f"the sum is {found:g} and must be {expected}")


class _Attempt:
    """Work in a thread of its own, as it may hang for ever in a library; the process then ends without it."""

    def __init__(self, work: Callable[[], None], limit_s: float) -> None:
        self.said: str | None = f"nothing came back within {limit_s:g} s"
        self._work, self._deadline = work, time.monotonic() + limit_s + 2
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        return not self._thread.is_alive() or time.monotonic() > self._deadline

    def wait(self) -> str | None:
        """None when the work was done in time, otherwise why not."""
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return self.said

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # whatever a library makes of a broken network is the finding
            self.said = " ".join(str(error).split())[:200] or type(error).__name__
        else:
            self.said = None
