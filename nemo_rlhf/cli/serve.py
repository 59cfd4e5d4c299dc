"""``nemo-rlhf serve-reward``: rank 0 speaks HTTP, and all ranks score together what has come in.

The other ranks wait in a broadcast of rank 0's, which never waits long enough for a time-out: an empty one is sent
now and then while nobody asks for anything.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nemo_rlhf.algorithms.scorer import Scorer
from nemo_rlhf.cli import stop
from nemo_rlhf.cli.rank import begin, end
from nemo_rlhf.cli.reward_server import Jobs, RewardServer
from nemo_rlhf.config.schema import ModelConfig, ServeRewardConfig

EXIT_DONE, EXIT_STOPPED = 0, 75
_POLL_S = 0.2  # between looks at signals
_BEAT_S = 20.0  # between signs of life, where time-outs are long

Texts = list[tuple[int, ...]]


class _Lockstep:
    """Rank 0's words to all ranks, in a group of their own: texts to score, nothing for now, or the end."""

    def __init__(self, timeout_s: int) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.beat_s = min(_BEAT_S, timeout_s / 4)

    def share(self, value: Any = None) -> Any:
        """Rank 0's ``value``, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def run_serve_reward(config: ServeRewardConfig) -> int:
    """Serve until SIGTERM or SIGUSR1 (exit code 75, so that the job may be requeued) or SIGINT (0).

    Raises:
        ValueError: wrong input, the same on every rank.
    """
    with stop.heeded(), _interrupts() as interrupted:
        begin(config.model, config.trainer, 0)
        lockstep = _Lockstep(config.trainer.timeout_s)
        server = _on_rank_zero(lockstep, lambda: RewardServer(config.server))
        try:
            scorer = Scorer(
                ModelConfig(**vars(config.model)), config.trainer.precision, normalise=config.server.normalise
            )
            _on_rank_zero(lockstep, lambda: _start(server, scorer))
            if server is not None:
                _lead(lockstep, server.jobs, scorer, config.server.batch_size, interrupted)
            else:
                _follow(lockstep, scorer)
        finally:
            if server is not None:
                server.close()
        return end(EXIT_DONE if lockstep.share(bool(interrupted)) else EXIT_STOPPED)


def _start(server: RewardServer | None, scorer: Scorer) -> None:
    assert server is not None
    server.start(scorer.encode)
    print(f"nemo-rlhf: scores at {server.url}", flush=True)


def _lead(lockstep: _Lockstep, jobs: Jobs, scorer: Scorer, batch_size: int, interrupted: list[int]) -> None:
    """Score what comes in, until a signal comes."""
    spoken = time.monotonic()
    while not (stop.noted() or interrupted):
        taken = jobs.take(batch_size, _POLL_S)
        texts: Texts = [text for job in taken for text in job.texts]
        if taken or time.monotonic() - spoken > lockstep.beat_s:
            lockstep.share(texts)
            spoken = time.monotonic()
        scores = scorer.scores(texts).tolist() if texts else []
        for job in taken:
            job.scores.set_result(scores[: len(job.texts)])
            del scores[: len(job.texts)]
    lockstep.share(None)


def _follow(lockstep: _Lockstep, scorer: Scorer) -> None:
    while (texts := lockstep.share()) is not None:
        if texts:
            scorer.scores(texts)


def _on_rank_zero(lockstep: _Lockstep, work: Any) -> Any:
    """What ``work`` gives there, None on the others; its ValueError on all."""
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = work()
        except ValueError as error:
            failure = str(error)
    if failure := lockstep.share(failure):
        raise ValueError(failure)
    return result


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Inside, Ctrl-C is noted in the list that this gives, and only rank 0 looks at it."""
    noted: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)
