"""The reference policy: the weights that training started from, which never change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.parallel.offload import Swap
from nemo_rlhf.parallel.schedule import Microbatch


class ResidentReference:
    """A second model beside the policy; between its uses it may wait in host memory."""

    def __init__(self, policy: PolicyModel, build: Callable[[], PolicyModel], offload: bool) -> None:
        self.model = build()
        self.model.gpt.load_state_dict(policy.gpt.state_dict())
        # its weights stay marked as trainable: torch.matmul takes another path with frozen ones, and the KL of
        # step 0 would not be exactly 0
        self._offload = offload
        if offload:
            self.model.weights_out()

    @contextmanager
    def applied(self) -> Iterator[PolicyModel]:
        if self._offload:
            self.model.weights_back()
        try:
            yield self.model
        finally:
            if self._offload:
                self.model.weights_out()

    def logprobs(self, microbatches: Sequence[Microbatch], temperature: float, like: Tensor) -> Tensor:
        with self.applied() as model:
            return model.logprobs(microbatches, temperature, like)[0]


class SwappedReference:
    """Weights in (pinned) host memory, which take the policy's place on the device while they are needed."""

    def __init__(self, policy: PolicyModel) -> None:
        self._policy = policy
        self._swap = Swap(policy.gpt.parameters())

    def logprobs(self, microbatches: Sequence[Microbatch], temperature: float, like: Tensor) -> Tensor:
        self._policy.gpt.settle()  # while it still has its own weights
        with self._swap.applied():
            return self._policy.logprobs(microbatches, temperature, like)[0]


Reference = ResidentReference | SwappedReference
