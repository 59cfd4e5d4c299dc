"""Where ranks meet: the store of torch.distributed, open to this machine alone where all ranks are on it.

torch opens it on every interface, and whoever connects may read and write it: what ranks tell each other of their
groups and sockets. Ranks on several machines need that; a single rank needs no port, and those of one machine only
loopback.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def join(backend: str, timeout: timedelta) -> None:
    """Initialise torch.distributed from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _own_store(rank, world, timeout)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)


def _own_store(rank: int, world: int, timeout: timedelta) -> Any:
    """A store that no other machine reaches; None: torch is to open its own."""
    if world == 1:
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if is_served_by_torchrun or not is_loopback(host):
        return None
    if rank:
        return dist.TCPStore(host, port, world, False, timeout)
    family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with suppress(OSError):  # what is wrong with the port, torch says to all ranks
        listener.bind(address)
        return dist.TCPStore(host, port, world, True, timeout, master_listen_fd=listener.detach())
    listener.close()
    return None


def is_loopback(host: str) -> bool:
    """Whether ``host`` means this machine to every machine: a name may do so on this one alone."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"
