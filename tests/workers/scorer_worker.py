"""What the ranks of tests/test_scorer.py do: score under each cut, run PPO with a reward model, wait for requests."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from nemo_rlhf.algorithms.scorer import Scorer
from nemo_rlhf.cli.reward_server import Jobs
from nemo_rlhf.cli.serve import _follow, _lead, _Lockstep
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.parallel import state
from tests.workers import run_worker


def work(payload: dict[str, Any]) -> dict[str, Any]:
    scores = {}
    for name, (tensor, pipeline) in payload["cuts"].items():
        state.initialize(tensor, pipeline, 1)
        config = ModelConfig(
            restore_from=payload["judge"],
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            micro_batch_size=3,
        )
        scorer = Scorer(config, "32", normalise=False)
        scores[name] = scorer.scores([scorer.encode(prompt, response, "") for prompt, response in payload["texts"]])
    return {"scores": scores, "idle": idle(timeout_s=2), "runs": run_worker.runs(payload["runs"])}


def idle(timeout_s: int) -> list[float]:
    """Wait for a request for longer than a rank may wait for another; what rank 0 then answered."""

    class Lengths:
        def scores(self, texts: list[tuple[int, ...]]) -> torch.Tensor:
            lengths = torch.tensor([float(len(text)) for text in texts])
            dist.all_reduce(lengths)  # fails where the ranks are not in step
            return lengths / dist.get_world_size()

    lockstep, answers, interrupted, jobs = _Lockstep(timeout_s), [], [], Jobs()
    if dist.get_rank():
        _follow(lockstep, Lengths())  # type: ignore[arg-type]
        return []

    def client() -> None:
        time.sleep(1.5 * timeout_s)
        for number in (1, 2):
            answers.extend(jobs.submit(bytes([number]), [(0,) * number, (0,) * 7]).result())
        interrupted.append(1)

    thread = threading.Thread(target=client)
    thread.start()
    _lead(lockstep, jobs, Lengths(), 8, interrupted)  # type: ignore[arg-type]
    thread.join()
    return answers
