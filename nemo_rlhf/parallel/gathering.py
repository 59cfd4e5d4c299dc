"""Updated weights that are gathered while the next learning pass already goes on.

A distributed optimizer changes on each data-parallel rank a share of the weights, which the others then need.
megatron's own overlap lets hooks on every module wait for them, in evaluation and while decoding too, and knows nothing
of weights that are read without a call of their module. Here layers wait in a learning pass alone, what stands outside
of layers is whole before it begins, and all others settle first (``GPT.settle``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn


class Gathering:
    """The weights of one model under megatron's DistributedDataParallel with ``overlap_param_gather``.

    Every method is called by all data-parallel ranks alike, as they gather together.
    """

    def __init__(self, ddp: DistributedDataParallel, layers: Iterable[nn.Module]) -> None:
        """``layers``: those modules, in their order, whose weights nobody reads but they themselves when called."""
        ddp.disable_forward_pre_hook(param_sync=False)  # megatron's hooks, on every module
        self._ddp = ddp
        self.is_stale = False  # this rank has updated its share and has not got those of the others
        self._by_layer = {layer: _groups(ddp, layer.parameters()) for layer in layers}
        inside = {parameter for layer in self._by_layer for parameter in layer.parameters()}
        self._outside = _groups(ddp, (p for p in ddp.module.parameters() if p not in inside))
        # in the order in which they are needed; a bucket may go over the edge of a layer
        needed = [self._outside, *self._by_layer.values()]
        self._groups = list(dict.fromkeys(group for groups in needed for group in groups))

    @contextmanager
    def overlapped(self) -> Iterator[None]:
        """A learning pass, in which every layer waits for its own weights."""
        if not self.is_stale:
            yield
            return
        self.is_stale = False
        for group in self._groups:
            group.start_param_sync()
        _wait(self._outside)
        hooks = [layer.register_forward_pre_hook(self._before_layer) for layer in self._by_layer]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            _wait(self._groups)  # of layers that the pass did not reach: it failed

    def settle(self) -> None:
        """Gather now what no pass has gathered."""
        if self.is_stale:
            self.is_stale = False
            self._ddp.start_param_sync(force_sync=True)

    def _before_layer(self, layer: nn.Module, _: Any) -> None:
        _wait(self._by_layer[layer])


def _groups(ddp: DistributedDataParallel, parameters: Iterable[nn.Parameter]) -> list[Any]:
    """The buckets that hold these parameters; frozen ones are in none."""
    of = ddp.param_to_bucket_group
    return list(dict.fromkeys(of[parameter] for parameter in parameters if parameter in of))


def _wait(groups: Iterable[Any]) -> None:
    for group in groups:
        if group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)  # which waits for what is under way
