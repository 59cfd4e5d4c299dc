"""A role of training as a NeMo model: a megatron module, with or without an optimizer, and how tokens go through it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from nemo.core.classes import ModelPT
from omegaconf import OmegaConf
from torch import Tensor

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.parallel import checkpoint, schedule, state
from nemo_rlhf.parallel.gpt import GPT, Role, build_gpt
from nemo_rlhf.parallel.offload import Offload
from nemo_rlhf.parallel.optimizer import ModelOptimizer
from nemo_rlhf.parallel.reading import load_object

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16}
_OPTIMIZER, _SCHEDULER = "optimizer", "scheduler.pt"


def rounding(precision: str) -> float:
    """How far log-probabilities of different passes may be apart where the same is computed: a logit of 16 rounded to
    the precision. On a CPU in fp32 they are the same."""
    return 8 * torch.finfo(DTYPES[precision]).eps


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite; it was not applied."""


class MegatronModel(ModelPT):
    """Base of the roles. ``gpt`` is the bare megatron module; ``learner`` is None in a role that does not learn.
    ``heads``: what the role has on its trunk beside or instead of the output layer (``Architecture.heads``);
    ``reads``: whether they want the states before the selected tokens or at them."""

    role: Role
    heads: tuple[str, ...] = ()
    reads: Literal["before", "at"] = "before"

    def __init__(self, config: ModelConfig, architecture: Architecture, precision: str) -> None:
        """``config``: how the model is cut and fed (TP and PP are those of the current process groups).

        Raises:
            ValueError: the model cannot be cut as the configuration asks.
        """
        super().__init__(OmegaConf.create(asdict(config)))
        self.config, self.architecture = config, architecture
        self._gpt = build_gpt(
            architecture,
            role=self.role,
            dtype=DTYPES[precision],
            sequence_parallel=config.sequence_parallel,
            recompute=config.activations_checkpoint_granularity,  # type: ignore[arg-type]
            layer_spec=config.layer_spec,
        )
        self.learner: ModelOptimizer | None = None
        self._weights: Offload | None = None

    @property
    def gpt(self) -> GPT:
        """With whole weights; to be asked for on all data-parallel ranks alike (``GPT.settle``)."""
        self._gpt.settle()
        return self._gpt

    @classmethod
    def list_available_models(cls) -> None:
        """There are none: models come from Hugging Face directories and Megatron checkpoints."""

    def setup_training_data(self, train_data_config: Any) -> None:
        """Data belongs to the algorithm."""

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Data belongs to the algorithm."""

    def make_trainable(self, optim: OptimConfig, total_steps: int) -> None:
        """Give the model gradients and an optimizer; ``total_steps`` optimizer steps in all."""
        learner = ModelOptimizer(self._gpt, optim, total_steps, self.config.overlap_param_gather)
        object.__setattr__(self, "learner", learner)

    def cut(
        self,
        tokens: Tensor,
        mask: Tensor,
        lengths: Tensor,
        rows: Sequence[int],
        fields: Mapping[str, Tensor] | None = None,
        together: int = 1,
    ) -> list[schedule.Microbatch]:
        """This data-parallel rank's microbatches of the given rows of a whole batch [B, S]; see ``schedule.cut``."""
        return schedule.cut(
            tokens,
            mask,
            lengths,
            rows[state.dp_rank() :: state.dp_size()],
            micro_batch_size=self.config.micro_batch_size,
            limit=self.architecture.max_position_embeddings,
            fields=fields,
            multiple_of=state.tp_size() if self._gpt.config.sequence_parallel else 1,
            together=together,
            reads=self.reads,
        )

    def pack(
        self, tokens: Tensor, mask: Tensor, lengths: Tensor, rows: Sequence[int], max_tokens: int
    ) -> list[schedule.Microbatch]:
        """The same of texts that share rows of at most ``max_tokens``."""
        return schedule.pack(
            tokens,
            mask,
            lengths,
            rows,
            max_tokens=max_tokens,
            share=(state.dp_rank(), state.dp_size()),
            multiple_of=state.tp_size() if self._gpt.config.sequence_parallel else 1,
        )

    def with_graph(self, microbatch: schedule.Microbatch, head: schedule.Head) -> schedule.Microbatch:
        """With what ``head`` says of it: for ``forward`` now and for ``learn`` before the weights change, on one
        stage."""
        hidden = schedule.through(self.gpt, microbatch)
        return replace(microbatch, hidden=hidden, said=head(self.gpt, hidden, microbatch))

    def forward(  # type: ignore[override]
        self, microbatches: Sequence[schedule.Microbatch], compute: schedule.Compute, like: Tensor
    ) -> dict[str, Tensor]:
        """What ``compute`` says of every selected token: host tensors [B, S] of the whole batch, on every rank."""
        parts = schedule.forward(self.gpt, microbatches, compute, like)
        # a small batch may leave a data-parallel rank without rows
        names = sorted(set().union(*state.gather_objects(list(parts))))
        nothing = torch.zeros(like.shape)
        return {name: state.sum_over_data_parallel(parts.get(name, nothing)) for name in names}

    def learn(self, microbatches: Sequence[schedule.Microbatch], loss: schedule.Loss) -> tuple[dict[str, float], float]:
        """One optimizer step. Returns the logged sums and the norm of the gradient before clipping.

        Raises:
            NonFiniteError: on every rank; the weights are as they were.
        """
        assert self.learner is not None
        self.learner.zero_grad()
        sums = schedule.forward_backward(self.learner.ddp, microbatches, loss)
        bad = [name for name, value in sums.items() if name.startswith("loss") and math.isnan(value)]
        if bad:
            raise NonFiniteError(f"{bad[0]} is NaN")
        norm = self.learner.step()
        if not norm < float("inf"):
            raise NonFiniteError(f"the gradient of {self.role} is not finite")
        return sums, norm

    def save_training_state(self, directory: Path) -> None:
        """The optimizer and its schedule, into a new directory."""
        assert self.learner is not None
        checkpoint.on_rank_zero(lambda: (directory / _OPTIMIZER).mkdir(parents=True))
        checkpoint.save_tensors(self.learner.sharded_state_dict(loading=False), directory / _OPTIMIZER)
        checkpoint.save_object(self.learner.scheduler.num_steps, directory / _SCHEDULER)

    def load_training_state(self, directory: Path) -> None:
        """Raises ValueError when the state is not this model's."""
        assert self.learner is not None
        wanted = self.learner.sharded_state_dict(loading=True)
        self.learner.load_state_dict(checkpoint.load_tensors(wanted, directory / _OPTIMIZER))
        done = load_object(directory / _SCHEDULER)
        self.learner.scheduler.num_steps = 0
        self.learner.scheduler.step(done)

    def weights_out(self) -> None:
        """Keep the weights in host memory until ``weights_back``."""
        gpt = self.gpt
        if self._weights is None:
            self._weights = Offload(gpt.parameters())
        self._weights.out()

    def weights_back(self) -> None:
        assert self._weights is not None
        self._weights.back()

    @property
    def weights_are_out(self) -> bool:
        return self._weights is not None and self._weights.is_out
