"""The checks on every node before a job's first step: ``nemo-rlhf preflight``, which job scripts start.

One process a GPU, or one a node without GPUs, inside the container of the job. They meet in a store on the first node,
say what they found, and sum a tensor together. The first process tells which nodes are at fault; what would
otherwise hang after an hour in the queue, or after loading 140 GB, fails here in seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import nemo_rlhf

REDUCE_S = 60.0  # for the all-reduce of everybody
PAIR_S = 10.0  # for one of two nodes
WORDS_S = 3.0  # for the others' words once one has failed: attempts that hang give up within 2 s of each other
_NUMBERS = 2**24  # in the tensor that is summed, 64 MiB, on GPUs: enough to use every link
_LIBRARIES = ("torch", "megatron-core", "nemo_toolkit", "transformers")
Store = Any


def run_preflight(words: Sequence[str]) -> NoReturn:
    """Check, say what is wrong, and end the process with exit code 0 or 1."""
    code = _check(_options(words))
    sys.stdout.flush()
    os._exit(code)  # a thread may hang in a library


def _check(options: argparse.Namespace) -> int:
    env = os.environ
    rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    local, node = int(env["SLURM_LOCALID"]), env.get("SLURMD_NODENAME") or socket.gethostname()
    host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"]) + 1  # the job itself will want the port
    limit = timedelta(seconds=options.timeout_s)
    try:
        store: Store = dist.TCPStore(host, port, world, rank == 0, limit, wait_for_workers=False)
    except RuntimeError as error:
        return _say(f"{node} cannot reach {host}:{port} within {options.timeout_s:g} s ({str(error).splitlines()[0]})")
    mine = {"node": node, "local": local, "versions": _versions(), "problem": _problem(node, local, options)}
    store.set(f"found/{rank}", json.dumps(mine))
    check = _Reduction(store, rank, world, options.gpus > 0)
    if rank:
        return check.follow(node, local)
    found, silent = _hear(store, world, options)
    complaints = [f"{node} was not heard of within {options.timeout_s:g} s" for node in silent]
    complaints += [f"{one['node']} {one['problem']}" for one in found if one["problem"]]
    complaints = complaints + _differences(found) or check.lead(found)
    for complaint in dict.fromkeys(complaints):
        _say(complaint)
    store.set("verdict", "bad" if complaints else "good")
    if not complaints:
        print(f"pre-flight: {len(options.nodes)} nodes are fine: {found[0]['versions']}.", flush=True)
    check.wait_for_farewells(len(found) - 1)
    return int(bool(complaints))


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("nemo-rlhf preflight", description=__doc__)
    parser.add_argument("--reads", required=True, help="file or directory that every node must see")
    parser.add_argument("--writes", required=True, help="directory that every node must be able to write to")
    parser.add_argument("--gpus", type=int, default=0, help="that every node must have")
    parser.add_argument("--min-free-gib", type=float, default=0.0, help="space that must be left in the directory")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="for everybody to be there")
    parser.add_argument("--nodes", nargs="+", required=True, help="names of all nodes, as SLURM calls them")
    return parser.parse_args(words)


def _say(complaint: str) -> int:
    print(f"pre-flight: {complaint}.", flush=True)
    return 1


def _versions() -> str:
    """Of what must be the same everywhere; of this package its very files, as a checkout may be a stale copy."""
    root, digest = Path(nemo_rlhf.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    libraries = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES)
    return f"nemo_rlhf {nemo_rlhf.__version__} ({digest.hexdigest()[:8]}), {libraries}"


def _problem(node: str, local: int, options: argparse.Namespace) -> str | None:
    """What keeps this process from doing its part, in words that follow the name of its node."""
    try:
        os.stat(options.reads)
    except OSError as error:
        return f"does not see {options.reads} ({error.strerror})"
    probe = Path(options.writes) / f".preflight_{node}_{local}"
    try:
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(options.writes).free / 2**30
    except OSError as error:
        return f"cannot write to {options.writes} ({error.strerror})"
    if free < options.min_free_gib:
        return f"has {free:.1f} GiB free at {options.writes}, less than slurm.min_free_gib={options.min_free_gib:g}"
    if options.gpus and torch.cuda.device_count() < options.gpus:
        return f"has {torch.cuda.device_count()} GPUs that work, not {options.gpus}"
    return None


def _hear(store: Store, world: int, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """What every process found, and the nodes of which one said nothing in time."""
    deadline = time.monotonic() + options.timeout_s
    keys = [f"found/{rank}" for rank in range(world)]
    while missing := [key for key in keys if not store.check([key])]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    found = [json.loads(store.get(key)) for key in keys if key not in missing]
    heard = [one["node"] for one in found]
    return found, [node for node in options.nodes if heard.count(node) < world // len(options.nodes)]


def _differences(found: list[dict[str, Any]]) -> list[str]:
    first = found[0]
    return [
        f"{one['node']} has {one['versions']}, but {first['node']} has {first['versions']}"
        for one in found
        if one["versions"] != first["versions"]
    ]


class _Reduction:
    """An all-reduce of every process, and, where that fails, of each node with the first, to find the bad one.

    Pairs sum on their hosts, also where there are GPUs: NCCL may still hang in the all-reduce that failed.
    """

    def __init__(self, store: Store, rank: int, world: int, on_gpus: bool) -> None:
        self._store, self._rank, self._world, self._on_gpus = store, rank, world, on_gpus

    def follow(self, node: str, local: int) -> int:
        """The part of every process but the first; returns its exit code."""
        store, pair = self._store, f"pair/{node}"
        everybody: _Attempt | None = None
        while not store.check(["verdict"]):
            if everybody is None and store.check(["reduce"]):
                everybody = _Attempt(self._everybody, REDUCE_S)
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
        mine = _Attempt(self._everybody, REDUCE_S)
        deadline = time.monotonic() + REDUCE_S + 5
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
                bad.append(f"{node} and {first} cannot sum a tensor over the network ({why})")
        return bad

    @staticmethod
    def _who_failed(found: list[dict[str, Any]], said: dict[int, str]) -> str:
        """Of the nodes that failed, where others did not; a bad one makes all fail before long, and the first to fail
        may be an innocent one."""
        failed = {rank: word for rank, word in said.items() if word != "ok"}
        everywhere = list(dict.fromkeys(one["node"] for one in found))
        ranks = failed or [rank for rank in range(len(found)) if rank not in said]
        nodes = list(dict.fromkeys(found[rank]["node"] for rank in ranks))
        why = next(iter(failed.values()), f"no end within {REDUCE_S:g} s")
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
        if self._on_gpus:
            self._on_devices()
        else:
            _sum_on_hosts(dist.PrefixStore("hosts", self._store.clone()), self._rank, self._world, REDUCE_S)

    def _on_devices(self) -> None:
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # raise when it takes too long
        torch.cuda.set_device(int(os.environ["SLURM_LOCALID"]))
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
