"""What a rank does first when it joins the others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from nemo_rlhf.parallel import state


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
