"""What the ranks of tests/test_saving.py do: save in the background, and be disturbed while they do."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallelConfig

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.parallel import checkpoint, optimizer, state
from nemo_rlhf.parallel.saver import Saver
from tests.workers.parallel_worker import OPTIM, TOTAL_STEPS, VOCAB, Cut, fresh, learn, message

ARCHITECTURE = Architecture(
    family="llama",
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=88,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    vocab_size=VOCAB,
    max_position_embeddings=96,
    layernorm_epsilon=1e-5,
    rope={"rope_type": "default", "rope_theta": 1e4},
    tie_embeddings=False,
)
WRITER = filesystem_async.FileSystemWriterAsync


def run(place: str) -> None:
    """Every case, and results in files, since the last case is the end of the rank."""
    directory = Path(place)
    buckets = padded_buckets()
    state.initialize(2, 1, seed=1)
    model = fresh("policy", Cut(tp=2), ARCHITECTURE)
    for parameter in model.gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.gpt.zero_vocabulary_padding()
    model.make_trainable(OPTIM, TOTAL_STEPS)
    learn(model, "policy", 2)

    def write(partial: Path) -> None:
        checkpoint.save_model(model.gpt, partial / "model")
        model.save_training_state(partial / "training")

    found = {
        "buckets": buckets,
        "snapshot": snapshot(model, write, directory),
        "order": order(write, directory),
        "failures": failures(write, directory),
    }
    (directory / f"found_{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    with held(directory / "never"):
        Saver(True, 60).save(directory / "killed", write)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


def padded_buckets() -> dict[str, int]:
    """On two replicas, with gradients in several padded buckets, as on GPUs: how many of the parameters that this rank
    writes have another one's values in the optimizer's part of a checkpoint."""
    state.initialize(1, 1, seed=1)
    odd = replace(ARCHITECTURE, hidden_size=52, kv_channels=14, ffn_hidden_size=90)
    model = fresh("policy", Cut(), odd)
    torch.manual_seed(1)
    for parameter in model.gpt.parameters():
        torch.nn.init.normal_(parameter)

    def several(**settings: Any) -> Any:
        return DistributedDataParallelConfig(**settings | {"overlap_grad_reduce": True, "bucket_size": 3000})

    with mock.patch.object(optimizer, "DistributedDataParallelConfig", several):
        model.make_trainable(OPTIM, TOTAL_STEPS)
    assert model.learner is not None
    (buffer,) = model.learner.ddp.buffers
    stored = model.learner.sharded_state_dict(loading=False)["param_state"]
    parameters = list(buffer.param_index_map)
    pairs = [(parameters[place], tensors["param"]) for place, tensors in stored.items() if "param" in tensors]
    wrong = [parameter for parameter, tensor in pairs if not torch.equal(tensor.data, parameter.data)]
    padded = sum(bucket.grad_data.numel() > bucket.numel_unpadded for bucket in buffer.buckets)
    return {"padded": padded, "parameters": len(pairs), "wrong": len(wrong)}


@contextmanager
def held(until: Path) -> Iterator[None]:
    """Processes that are forked inside write nothing before the file ``until`` is there."""
    original = WRITER.write_preloaded_data

    def wait_and_write(*args: Any, **kwargs: Any) -> Any:
        while not until.exists():
            time.sleep(0.02)
        return original(*args, **kwargs)

    with mock.patch.object(WRITER, "write_preloaded_data", staticmethod(wait_and_write)):
        yield


def snapshot(model: Any, write: Callable[[Path], None], directory: Path) -> dict[str, Any]:
    """The same state saved by the ranks and in the background, where training goes on before anything is written."""
    checkpoint.write_atomically(directory / "by_ranks", write)
    saver, go = Saver(True, 60), directory / "go"
    with held(go):
        saver.save(directory / "beside", write)
    learn(model, "policy", 2)
    found: dict[str, Any] = {"early": saver.poll(), "there": (directory / "beside").exists()}
    dist.barrier()
    go.touch()
    polls = 1
    while not saver.poll():
        time.sleep(0.02)
        polls += 1
    checkpoint.verify(directory / "beside")
    return {**found, "polls": polls, "pending": saver.pending, "again": [saver.poll(), saver.wait()]}


def order(write: Callable[[Path], None], directory: Path) -> dict[str, Any]:
    """What is there after a second save was asked for, and what after the wait."""
    saver = Saver(True, 60)
    saver.save(directory / "first", write)
    saver.save(directory / "second", write)
    found = {"first": (directory / "first").exists(), "pending": str(saver.pending)}
    waited = saver.wait()
    checkpoint.verify(directory / "first")
    checkpoint.verify(directory / "second")
    return {**found, "waited": waited}


def failures(write: Callable[[Path], None], directory: Path) -> dict[str, Any]:
    """The sentence about each way to fail on rank 1, and what is left in the directory."""
    rank_one = dist.get_rank() == 1
    found = {}

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    def fails(name: str, saver: Saver) -> None:
        said = message(saver.wait, checkpoint.SaveError)
        dist.barrier()
        checkpoint.verify(directory / "first")
        found[name] = said, sorted(path.name for path in directory.iterdir() if path.suffix == ".partial")
        dist.barrier()

    saver = Saver(True, 60)
    with mock.patch.object(filesystem_async, "_write_item", full if rank_one else filesystem_async._write_item):
        saver.save(directory / "first", write)
    fails("full disk", saver)
    with held(directory / ("never" if rank_one else "go")):
        saver.save(directory / "first", write)
    if rank_one:
        for writer in saver._writers:
            writer.stop()
    fails("killed writer", saver)
    late = Saver(True, 2)
    with held(directory / ("never" if rank_one else "go")):
        late.save(directory / "first", write)
    fails("late writer", late)
    with held(directory / "never"):
        saver.save(directory / "abandoned", write)
    saver.abandon()
    assert saver.pending is None
    saver.save(directory / "abandoned", write)
    saver.wait()
    checkpoint.verify(directory / "abandoned")
    return found
