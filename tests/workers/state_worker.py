"""What a rank does first when it joins the others."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from nemo_rlhf.parallel import state


def first_calls(payload: Any) -> list[str]:
    """Names of the functions of torch.distributed that make or use groups, in the order of their calls."""
    called: list[str] = []
    for name in ("init_process_group", "all_reduce", "new_group"):

        def noted(*given: Any, _name: str = name, _real: Any = getattr(dist, name), **named: Any) -> Any:
            called.append(_name)
            return _real(*given, **named)

        setattr(dist, name, noted)
    state.initialize(2, 1, seed=1)
    return called
