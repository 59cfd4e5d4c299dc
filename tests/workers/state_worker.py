"""What a rank does first when it joins the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch.distributed as dist

from nemo_rlhf.parallel import meeting, state


def first_calls(payload: Any) -> list[str]:
    """Names of the functions of torch.distributed that make or use groups, in the order of their calls."""
    called: list[str] = []
    for name in ("init_process_group", "all_reduce", "new_group"):
        setattr(dist, name, partial(_note, called, name, getattr(dist, name)))
    state.initialize(2, 1, seed=1)
    return called


def _note(called: list[str], name: str, real: Callable[..., Any], *given: Any, **named: Any) -> Any:
    called.append(name)
    return real(*given, **named)


def addresses(payload: dict[str, str]) -> list[str]:
    """At which this rank listens, once it has joined the others; ``payload``: of the environment."""
    os.environ.update(payload)
    meeting.join("gloo", timedelta(seconds=60))
    dist.new_group([0], backend="gloo")
    dist.barrier()
    found = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
    store = type(dist.distributed_c10d._get_default_store().underlying_store).__name__
    dist.barrier()
    return [store, *sorted(found)]
