"""The checks on every node before a job's first step: ``nemo-rlhf preflight``, which job scripts start.

One process a GPU, or one a node without GPUs, inside the container of the job. They meet in a store on the first node,
say what they found (``preflight_node``), and sum a tensor together (``preflight_sum``). The first process tells which
nodes are at fault: what would hang after an hour in the queue, or after loading 140 GB, fails here in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from nemo_rlhf.cli import preflight_node
from nemo_rlhf.cli.preflight_sum import Reduction, Store


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
    mine = {
        "node": node,
        "local": local,
        "versions": preflight_node.versions(),
        "problem": preflight_node.problem(node, local, options),
        "device": preflight_node.only_device() if options.gpus else None,
    }
    store.set(f"found/{rank}", json.dumps(mine))
    check = Reduction(store, rank, world, options.gpus > 0)
    if rank:
        return check.follow(node, local)
    found, silent = _hear(store, world, options)
    complaints = [f"{node} was not heard of within {options.timeout_s:g} s" for node in silent]
    complaints += [f"{one['node']} {one['problem']}" for one in found if one["problem"]]
    complaints += [*_differences(found), *_shared_devices(found)]
    complaints = complaints or check.lead(found)
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


def _shared_devices(found: list[dict[str, Any]]) -> list[str]:
    """Complaints on nodes of which several tasks see one device only, and the same."""
    tasks: dict[tuple[str, str], list[int]] = {}
    for one in found:
        if one["device"]:
            tasks.setdefault((one["node"], one["device"]), []).append(one["local"])
    return [
        f"{node} shows its tasks {', '.join(map(str, sorted(locals_)))} the same single GPU ({device}): let every task "
        "see all GPUs of its node, or bind another one to each (slurm.options)"
        for (node, device), locals_ in tasks.items()
        if len(locals_) > 1
    ]
