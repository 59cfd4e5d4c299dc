"""Lightning's strategy for models that megatron-core cuts: it wraps nothing, moves nothing and saves directories."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from nemo_rlhf import device
from nemo_rlhf.parallel import checkpoint, state, watch
from nemo_rlhf.parallel.reading import load_object
from nemo_rlhf.parallel.saver import Saver

_LIGHTNING = "lightning.pt"


class Restorable(Protocol):
    """What a module must offer to be saved and restored; all ranks call both."""

    def save_to(self, directory: Path) -> None: ...

    def load_from(self, directory: Path) -> None: ...


class MegatronStrategy(DDPStrategy):
    """Process groups are those of ``parallel.state``, gradients and weights the business of megatron's optimizer.

    Lightning's own dictionary (loops, callbacks) is a file in the checkpoint directory, beside what the module writes.
    """

    def __init__(self, timeout_s: int, *, async_save: bool) -> None:
        """``async_save``: checkpoints are written while training goes on."""
        self.saver = Saver(async_save, timeout_s)
        super().__init__(
            process_group_backend=device.backend(),
            timeout=timedelta(seconds=timeout_s),
            cluster_environment=TorchElasticEnvironment(),
        )

    def setup(self, trainer: Trainer) -> None:
        # not the parent's: it would wrap the module in DDP and send rank 0's weights over the other shards
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Parts choose their devices themselves; host tensors made on the way must stay on the host."""
        yield

    def model_to_device(self) -> None:
        """The parts were built on their device."""

    def teardown(self) -> None:
        # not the parent's: it would move every weight to the CPU, those that are offloaded too
        assert self.accelerator is not None and self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": state.dp_size(), "rank": state.dp_rank()}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # the optimizer's state needs an optimizer

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Done by ``load_checkpoint``."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Done by ``load_checkpoint``."""

    def save_checkpoint(self, checkpoint_dict: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As ``Saver.save``."""
        module: Any = self.lightning_module
        watch.enter("saving")

        def write(directory: Path) -> None:
            checkpoint.save_object(checkpoint_dict, directory / _LIGHTNING)
            module.save_to(directory)

        self.saver.save(Path(filepath), write)

    def load_checkpoint(self, checkpoint_path: Any) -> dict[str, Any]:
        module: Any = self.lightning_module
        watch.enter("loading")
        module.load_from(Path(checkpoint_path))
        return load_object(Path(checkpoint_path) / _LIGHTNING)

    def remove_checkpoint(self, filepath: Any) -> None:
        checkpoint.remove(Path(filepath))
