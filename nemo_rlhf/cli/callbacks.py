"""What happens around the steps: checkpoints, signals, progress on the terminal."""

from __future__ import annotations

import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console

from nemo_rlhf.algorithms.base import Algorithm, stored_metrics
from nemo_rlhf.cli import stop
from nemo_rlhf.cli.samples import ROLLOUTS, read_jsonl, sample_files, samples_table, spread
from nemo_rlhf.config.schema import CheckpointConfig
from nemo_rlhf.models.base import NonFiniteError
from nemo_rlhf.parallel import checkpoint
from nemo_rlhf.parallel.saver import Saver
from nemo_rlhf.parallel.strategy import MegatronStrategy
from nemo_rlhf.rollout.score import Unavailable

CHECKPOINTS, BEST, DAMAGED = "checkpoints", "best", ".damaged"


def stored_checkpoints(run_dir: Path) -> list[Path]:
    """``checkpoints/step_N`` directories under their final names, oldest first."""
    found = [p for p in (Path(run_dir) / CHECKPOINTS).glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def newest_whole_checkpoint(run_dir: Path) -> Path | None:
    """The latest checkpoint that its manifest confirms; later ones, which are damaged, are named in a warning and get
    another name, so that nothing counts them any more. All ranks call it.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    stored = stored_checkpoints(run_dir)
    damaged: dict[Path, ValueError] = {}
    for path in reversed(stored):
        try:
            checkpoint.verify(path)
        except ValueError as error:
            damaged[path] = error
            continue
        for later, reason in damaged.items():
            aside = _set_aside(later)
            warnings.warn(f"{reason} The one before is used. This one is now {aside}: delete it.", stacklevel=2)
        return path
    if stored:
        raise ValueError(
            f"{damaged[stored[0]]} There is no whole one before it: restore it, or delete {stored[0].parent}."
        )
    return None


def _set_aside(path: Path) -> Path:
    """Rank 0 gives a damaged checkpoint a name that is none of a checkpoint's; returns it."""
    aside = path.with_name(path.name + DAMAGED)
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    dist.barrier()
    return aside


def _saver(trainer: Trainer) -> Saver:
    assert isinstance(trainer.strategy, MegatronStrategy)
    return trainer.strategy.saver


def remove_unfinished(run_dir: Path) -> None:
    """Rank 0 deletes what a run that was killed while it saved has left: it fills the disk and nobody reads it."""
    if dist.get_rank() == 0:
        for path in (Path(run_dir) / CHECKPOINTS).glob(f"step_*{checkpoint.PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)


class StopSignals(Callback):
    """SIGTERM and SIGUSR1 let the step end; ``requested`` is then the signal, on every rank after the same step."""

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        stop.listen()  # once more: Lightning has put handlers of its own in place

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if self._is_requested(pl_module):
            trainer.should_stop = True

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, Unavailable):  # which every rank raises, and which a signal may have brought about
            self._is_requested(pl_module)

    def _is_requested(self, pl_module: Any) -> bool:
        number = torch.tensor(float(stop.number()), device=pl_module.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number:
            self.requested = signal.Signals(int(number))
        return self.requested is not None


class Checkpoints(Checkpoint):
    """Saves ``checkpoints/step_N``, keeps the last few and the best few, and lets ``checkpoints/best`` point to the
    best of all.

    Must come after ``StopSignals`` among the callbacks, so that a stop saves in the same step.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, stop: StopSignals) -> None:
        self._run_dir, self._config, self._stop = Path(run_dir), config, stop
        self._stored = 0  # the step whose state is on disk, or on its way to it
        self._scores_on_their_way: dict[Path, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._stored = pl_module.completed_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        algorithm: Algorithm = pl_module
        step = algorithm.completed_steps
        if _saver(trainer).poll():
            self._prune()
        due = step % self._config.every_n_train_steps == 0 or step == algorithm.max_steps
        better = self._is_among_best(algorithm.metrics.get(self._config.monitor))
        if due or better or self._stop.requested:
            self._save(trainer, algorithm)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if _saver(trainer).wait():
            self._prune()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """What was done until then is kept: where a source of rewards stays away, the last step, too."""
        if not isinstance(exception, Unavailable | NonFiniteError):  # which every rank raises
            _saver(trainer).abandon()  # the others may not come
            return
        if isinstance(exception, Unavailable) and pl_module.completed_steps != self._stored:
            self._save(trainer, pl_module)
        if _saver(trainer).wait():
            self._prune()

    def _save(self, trainer: Trainer, algorithm: Algorithm) -> None:
        step = algorithm.completed_steps
        path = self._run_dir / CHECKPOINTS / f"step_{step}"
        trainer.save_checkpoint(path)
        self._stored = step
        self._prune()
        value = algorithm.metrics.get(self._config.monitor)
        if _saver(trainer).pending is not None and value is not None:
            self._scores_on_their_way[path] = self._sign() * value

    def _sign(self) -> float:
        return 1.0 if self._config.mode == "max" else -1.0

    def _scores(self) -> dict[Path, float]:
        scores = {}
        for path in stored_checkpoints(self._run_dir):
            try:
                value = stored_metrics(path)[1].get(self._config.monitor)
            except (OSError, ValueError, KeyError):  # damaged: its name came up when the run started
                continue
            if value is not None:
                scores[path] = self._sign() * value
        return scores

    def _is_among_best(self, value: float | None) -> bool:
        if value is None or self._config.save_top_k == 0:
            return False
        scores = self._scores_on_their_way | self._scores()
        best = sorted(scores.values(), reverse=True)[: self._config.save_top_k]
        return len(best) < self._config.save_top_k or self._sign() * value > best[-1]

    def _prune(self) -> None:
        """Of the checkpoints that are whole, rank 0 deletes what is neither recent nor best."""
        self._scores_on_their_way.clear()
        if dist.get_rank() == 0:
            self._prune_stored()
        dist.barrier()

    def _prune_stored(self) -> None:
        stored = stored_checkpoints(self._run_dir)
        keep = set(stored[-self._config.save_last_k :])
        scores = self._scores()
        best = sorted(scores, key=lambda path: (scores[path], int(path.name.removeprefix("step_"))), reverse=True)
        best = best[: self._config.save_top_k]
        if best:
            keep.update(best)
            link = best[0].parent / BEST
            link.unlink(missing_ok=True)
            link.symlink_to(best[0].name)
        for path in stored:
            if path not in keep:
                checkpoint.remove(path)


class Progress(Callback):
    """One line a step on rank 0: where the run is, how it does, when it will end; and every ``show_samples_every``
    steps (0: never) a few of the samples that the step has left in ``run_dir``."""

    NUM_SAMPLES = 4

    SHOWN = (
        ("loss", "loss"),
        ("reward/mean", "reward"),
        ("kl/mean", "kl"),
        ("response_length/mean", "length"),
        ("val/reward", "val reward"),
        ("val/loss", "val loss"),
    )

    def __init__(self, run_dir: Path, show_samples_every: int) -> None:
        self._run_dir, self._show_samples_every = run_dir, show_samples_every
        self._console = Console(stderr=True, highlight=False)
        self._started = (0, time.monotonic())

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._started = (pl_module.completed_steps, time.monotonic())

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.is_global_zero and pl_module.completed_steps == 0 and pl_module.metrics:
            self._print(pl_module, "")  # of the validation before training

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        first, start = self._started
        step, elapsed = pl_module.completed_steps, time.monotonic() - start
        left = (pl_module.max_steps - step) * elapsed / max(1, step - first)
        if trainer.is_global_zero:
            self._print(pl_module, f"{pl_module.metrics['time/total_s']:.1f} s  {_clock(left)} left")
            if self._show_samples_every and step % self._show_samples_every == 0:
                records = read_jsonl(sample_files(self._run_dir, ROLLOUTS)[step])
                self._console.print(samples_table(spread(records, self.NUM_SAMPLES), f"samples of step {step}"))

    def _print(self, algorithm: Algorithm, timing: str) -> None:
        width = len(str(algorithm.max_steps))
        figures = "  ".join(f"{word} {algorithm.metrics[n]:.4g}" for n, word in self.SHOWN if n in algorithm.metrics)
        line = f"step {algorithm.completed_steps:>{width}}/{algorithm.max_steps}  {figures}  {timing}"
        self._console.print(line.rstrip(), soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
