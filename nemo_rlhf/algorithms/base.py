"""What every algorithm is to Lightning: a module whose training step is one step of the algorithm."""

from __future__ import annotations

import json
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from nemo_rlhf import device
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.data.tokenizer import fingerprint
from nemo_rlhf.models.base import NonFiniteError
from nemo_rlhf.parallel import checkpoint, state, watch
from nemo_rlhf.parallel.reading import load_object
from nemo_rlhf.rollout.isolation import random_states, set_random_states
from nemo_rlhf.untrusted import read_json

_STATE, _IDENTITY = "state.pt", "identity.json"
Metrics = dict[str, float]


class StepCounter(torch.optim.Optimizer):
    """The optimizer that Lightning sees: one step of it is one step of the algorithm, however many updates of however
    many models that makes. Lightning counts its steps, and whatever counts steps counts these."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(())], {})

    def step(self, closure: Any = None) -> Any:
        return closure()


class _Steps(torch.utils.data.IterableDataset):
    """Numbers of the steps to come. Data is a function of the step, so there is no position to restore."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm

    def __iter__(self) -> Iterator[int]:
        first = self._algorithm.completed_steps - (self._algorithm.unvalidated is not None)
        return iter(range(first, self._algorithm.max_steps))


class Algorithm(LightningModule):
    """``completed_steps``: steps done, over all resumptions; ``metrics``: those of the last one; ``unvalidated``: those
    of a step that is done and whose validation could not be; ``constants``: metrics that are the same at every step;
    ``origin``: what the run is made from, which checkpoints keep; ``gradient_norms``: of every update of the step, by
    the role that learned."""

    def __init__(
        self, run_dir: Path, max_steps: int, val_check_interval: int, tokenizer: Any, tokenizer_dir: Path
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.run_dir, self.max_steps, self.val_check_interval = Path(run_dir), max_steps, val_check_interval
        self.tokenizer, self.tokenizer_dir = tokenizer, tokenizer_dir
        self.completed_steps = 0
        self.metrics: Metrics = {}
        self.unvalidated: Metrics | None = None
        self.origin: dict[str, Any] = {}
        self.gradient_norms: dict[str, list[float]] = {}
        self._still: set[str] = set()  # roles of which it was said that they learned nothing
        self.constants: Metrics = {}

    @abstractmethod
    def run_step(self, step: int) -> Metrics:
        """One step of the algorithm; all ranks call it."""

    @abstractmethod
    def validate(self) -> Metrics:
        """Metrics ``val/...``; all ranks call it."""

    @abstractmethod
    def architecture(self) -> Architecture:
        """Of the model that is trained."""

    @abstractmethod
    def save_models(self, directory: Path) -> None:
        """Models and optimizers, into an existing directory."""

    @abstractmethod
    def load_models(self, directory: Path) -> None:
        """What ``save_models`` wrote."""

    @abstractmethod
    def loop_state(self) -> dict[str, Any]:
        """Plain numbers that the next step depends on."""

    @abstractmethod
    def load_loop_state(self, loaded: dict[str, Any]) -> None:
        """What ``loop_state`` gave."""

    def validation_path(self) -> Path:
        """Where the samples of this step's validation go."""
        return self.run_dir / "validation" / f"step_{self.completed_steps}.jsonl"

    def not_finite(self, error: NonFiniteError, batch: Mapping[str, Any]) -> NonFiniteError:
        """Keep ``batch`` for inspection; the error to raise in the place of ``error``, which says where it is."""
        path = self.run_dir / f"bad_batch_step_{self.completed_steps + 1}.pt"
        checkpoint.save_object(dict(batch), path)
        return NonFiniteError(
            f"{error} in step {self.completed_steps + 1}: the update was not applied and its batch is in {path}; lower "
            f"the learning rate or look at the batch, then run again to go on from the last checkpoint."
        )

    def configure_optimizers(self) -> StepCounter:
        return StepCounter()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(_Steps(self), batch_size=None)

    def on_train_start(self) -> None:
        if self.completed_steps == 0 and self.val_check_interval:
            self._log(self._validate())

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step(closure=lambda: self._step(int(batch)))

    def _step(self, step: int) -> None:
        if self.unvalidated is None:
            self.unvalidated = self._timed(step)
            self.completed_steps = step + 1
        metrics = self.unvalidated
        last = self.completed_steps == self.max_steps
        if self.val_check_interval and (self.completed_steps % self.val_check_interval == 0 or last):
            metrics = metrics | self._validate()
        self.unvalidated = None
        self._log(metrics)

    def _validate(self) -> Metrics:
        watch.enter("validation")
        return self.validate()

    def _timed(self, step: int) -> Metrics:
        watch.enter_step(step + 1)
        self.gradient_norms.clear()
        start = time.perf_counter()
        metrics = self.run_step(step)
        device.synchronize()
        metrics["time/total_s"] = time.perf_counter() - start
        metrics |= self.constants
        metrics["memory/peak_mib"] = float(state.max_over_data_parallel(torch.tensor(device.peak_memory_mib())))
        self._tell_of_no_gradients(step + 1)
        return metrics

    def _tell_of_no_gradients(self, step: int) -> None:
        for role, norms in self.gradient_norms.items():
            if not any(norms) and role not in self._still:
                self._still.add(role)
                warnings.warn(
                    f"the gradient of the {role} was exactly 0 in step {step}, so that it learned nothing. Look for "
                    "rewards that are all alike, a loss that has no use for its weights, or code that turns gradients "
                    "off. This is said once.",
                    stacklevel=2,
                )

    def _log(self, metrics: Metrics) -> None:
        self.metrics = metrics
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.completed_steps % every == 0 or self.completed_steps == self.max_steps:
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.completed_steps)

    def save_to(self, directory: Path) -> None:
        """Everything that the next step depends on, into an existing directory; all ranks call it."""
        self.save_models(directory)
        loop = {
            "completed_steps": self.completed_steps,
            "unvalidated": self.unvalidated,
            "rng": torch.get_rng_state(),
            "rng_of_people": random_states(),
            **self.loop_state(),
        }
        checkpoint.save_object(loop, directory / _STATE)
        metrics = self.metrics if self.unvalidated is None else self.unvalidated
        described = {**self._identity(), "step": self.completed_steps, "metrics": metrics, "origin": self.origin}
        identity = json.dumps(described, indent=1)

        def write() -> None:
            (directory / _IDENTITY).write_text(identity)

        checkpoint.on_rank_zero(write)

    def load_from(self, directory: Path) -> None:
        """Continue from what ``save_to`` wrote.

        Raises:
            ValueError: it belongs to another model, tokenizer or algorithm.
        """
        stored = read_json(directory / _IDENTITY)
        for name, value in self._identity().items():
            if stored.get(name) != value:
                raise ValueError(
                    f"the checkpoint {directory} has another {name} than model.restore_from: use the model that this "
                    f"run was started with, or another exp_manager.explicit_log_dir."
                )
        self.load_models(directory)
        loop = load_object(directory / _STATE)
        self.completed_steps, self.unvalidated = loop["completed_steps"], loop["unvalidated"]
        torch.set_rng_state(loop["rng"])
        set_random_states(loop.get("rng_of_people", {}))
        self.load_loop_state(loop)

    def _identity(self) -> dict[str, Any]:
        architecture = self.architecture()
        sizes = {
            name: value
            for name, value in vars(architecture).items()
            if name not in ("hf_config", "initializer_range", "dtype", "heads", "score_mean", "score_std")
        }
        return {
            "algorithm": type(self).__name__,
            "architecture": json.loads(json.dumps(sizes)),
            "tokenizer": fingerprint(self.tokenizer),
        }


def stored_metrics(directory: Path) -> tuple[int, Metrics]:
    """Step and metrics of a checkpoint. Raises OSError, ValueError or KeyError where there is no whole one."""
    stored = read_json(directory / _IDENTITY)
    return stored["step"], stored["metrics"]


def stored_origin(directory: Path) -> dict[str, Any]:
    """``Algorithm.origin`` of a whole checkpoint; empty where an earlier version has written it."""
    origin: dict[str, Any] = read_json(directory / _IDENTITY).get("origin", {})
    return origin


class PhaseTimer:
    """Seconds by phase, as metrics ``time/<phase>_s``."""

    def __init__(self) -> None:
        self.metrics: Metrics = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        watch.enter(phase)
        device.synchronize()
        start = time.perf_counter()
        yield
        device.synchronize()
        self.metrics[f"time/{phase}_s"] = time.perf_counter() - start
