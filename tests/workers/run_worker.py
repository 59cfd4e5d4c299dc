"""Whole runs of the console program, several in one process: what costs time is importing, not running."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nemo_rlhf import cli
from tests import bombs


def runs(payload: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run each of ``payload`` on all ranks, one after the other.

    Keys of a run: ``arguments`` of nemo-rlhf; ``stop_in_step``: the step (from 1) in which this process gets SIGUSR1;
    ``nan_in_step``: the step whose policy loss is made NaN; ``copy``: a pair (from, to) of directories to copy before;
    ``damage``: a file to flip a byte of before; ``plant``: what ``bombs.plant`` is given then; ``env``: variables.
    Returns for each ``code``, ``stderr``, ``seconds`` and, where a run ended in an exception that the program does not
    expect, ``traceback``.
    """
    results = []
    for number, each in enumerate(payload):
        with mock.patch.object(cli, "_speaks", _in_run(number)):
            results.append(_run(**each))
    return results


def _in_run(number: int, original: Any = cli._speaks) -> Any:
    """Two runs of one process may have to say the same."""
    return lambda rank, sentence: original(rank, f"{number}: {sentence}")


def _run(
    arguments: list[str],
    stop_in_step: int | None = None,
    nan_in_step: int | None = None,
    copy: tuple[str, str] | None = None,
    damage: str | None = None,
    plant: tuple[str, str, str] | None = None,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    if os.environ["RANK"] == "0":
        if copy is not None:
            shutil.copytree(*copy, symlinks=True)
        if damage is not None:
            flip_a_byte(Path(damage))
        if plant is not None:
            bombs.plant(*plant)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    heard = io.StringIO()
    result: dict[str, Any] = {"code": None}
    start = time.monotonic()
    if arguments[0] != "convert":
        arguments = [*arguments, f"trainer.devices={os.environ['WORLD_SIZE']}"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(heard))
        stack.enter_context(mock.patch.dict(os.environ, env or {}))
        if stop_in_step is not None:
            stack.enter_context(_signal_in(stop_in_step))
        if nan_in_step is not None:
            stack.enter_context(_nan_in(nan_in_step, result))
        try:
            result["code"] = cli.main(arguments)
        except Exception:
            result["traceback"] = traceback.format_exc()
    return {**result, "stderr": heard.getvalue(), "seconds": time.monotonic() - start}


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@contextlib.contextmanager
def _signal_in(step: int) -> Iterator[None]:
    """A signal while step ``step`` is under way, on one rank only: the others must learn of it."""
    from nemo_rlhf.algorithms.ppo import PPO
    from nemo_rlhf.algorithms.rft import RFT
    from nemo_rlhf.algorithms.sft import SFT

    with contextlib.ExitStack() as stack:
        for kind in (PPO, RFT, SFT):
            stack.enter_context(mock.patch.object(kind, "run_step", _signalling(kind.run_step, step)))
        yield


def _signalling(original: Any, step: int) -> Any:
    def run_step(self: Any, number: int) -> Any:
        if number + 1 == step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, number)

    return run_step


@contextlib.contextmanager
def _nan_in(step: int, result: dict[str, Any]) -> Iterator[None]:
    """The policy's loss is NaN in ``step``; ``result`` tells whether its weights changed in that update."""
    from nemo_rlhf.algorithms import ppo, ppo_losses

    original_loss, original_learn = ppo_losses.policy_loss, ppo.PolicyModel.learn
    at = {"step": 0}

    def loss(*arguments: Any, **keywords: Any) -> Any:
        value, logged = original_loss(*arguments, **keywords)
        if at["step"] == step:
            value = value * float("nan")
            logged = {**logged, "loss/policy": logged["loss/policy"] * float("nan")}
        return value, logged

    def learn(self: Any, *arguments: Any) -> Any:
        before = [parameter.detach().clone() for parameter in self.gpt.parameters()]
        try:
            return original_learn(self, *arguments)
        except ValueError:
            result["weights_kept"] = all(torch.equal(a, b) for a, b in zip(before, self.gpt.parameters(), strict=True))
            raise

    def run_step(self: Any, number: int, original: Any = ppo.PPO.run_step) -> Any:
        at["step"] = number + 1
        return original(self, number)

    with (
        mock.patch.object(ppo_losses, "policy_loss", loss),
        mock.patch.object(ppo.PolicyModel, "learn", learn),
        mock.patch.object(ppo.PPO, "run_step", run_step),
    ):
        yield


def fail_alone(directory: str) -> str:
    """Rank 0 fails in what only rank 0 writes, while the others go on to a collective; what each rank says then."""
    from megatron.core.dist_checkpointing import ShardedTensor, serialization

    from nemo_rlhf.parallel import checkpoint, state

    state.initialize(1, 1, 0)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def write(partial: Path) -> None:
        weights = ShardedTensor.from_rank_offsets("weights", torch.ones(4), (0, rank, world_size))
        (partial / "weights").mkdir(exist_ok=True)
        torch.distributed.barrier()
        checkpoint.save_tensors({"weights": weights, "plain": 3}, partial / "weights")

    full = OSError(28, "No space left on device")
    with mock.patch.object(serialization, "save_config", side_effect=full if rank == 0 else None):
        try:
            checkpoint.write_atomically(Path(directory) / "checkpoint", write)
        except checkpoint.SaveError as error:
            return str(error)
    return "saved"


def train_api(payload: dict[str, str]) -> dict[str, Any]:
    """``nemo_rlhf.train`` several times in one process, and the console program on what it leaves."""
    import nemo_rlhf

    hf, root = payload["hf"], Path(payload["root"])

    def config(command: str, name: str, *overrides: str) -> Any:
        sizes = ("model.init=random", "model.global_batch_size=3", "model.micro_batch_size=3", "trainer.max_steps=1")
        log = (f"exp_manager.explicit_log_dir={root / name}", "exp_manager.create_tensorboard_logger=false")
        return nemo_rlhf.config(command, overrides=[*log, *sizes, *overrides])

    untouched = nemo_rlhf.train(
        hf,
        samples=[["ab ", "cd", "ef ", "gh"], {"prompt": "k ", "response": "lm"}, "whole"],
        config=config("sft", "untouched", "model.optim.lr=1e-30", "model.optim.weight_decay=0"),
    )
    texts = [[f"{letter} ", letter * (2 + place % 3)] for place, letter in enumerate("abcdefghijklmnopqrstuvwxyz")]
    learned = nemo_rlhf.train(
        hf,
        samples=texts,
        eval_samples=texts,
        config=config(
            "sft", "learned", "model.global_batch_size=24", "model.micro_batch_size=12", "trainer.max_steps=60",
            "model.optim.lr=1e-2", "trainer.val_check_interval=60", "trainer.enable_progress_bar=false",
        ),
    )  # fmt: skip
    rollouts = ("ppo.num_prompts=3", "ppo.samples_per_prompt=2", "generation.max_new_tokens=6")
    nemo_rlhf.train(
        hf,
        reward_fn=_rising,
        prompts=["a ", "b "],
        config=config("ppo", "dense", *rollouts, "generation.ignore_eos=true"),
    )
    after = nemo_rlhf.train(
        learned.checkpoint,
        reward_fn=lambda outputs, **rest: [float(len(output)) for output in outputs],
        prompts=["a ", "b "],
        config=config("ppo", "after", *rollouts, "model.init=pretrained"),
    )
    sources = "reward.sources=[{kind: function, name: fit, function: 'nemo_rlhf.rollout.rules:regex_match', "
    sources += "arguments: {pattern: a}}]"
    sourced = nemo_rlhf.train(hf, prompts=["a ", "b "], config=config("ppo", "sourced", *rollouts, sources))
    assert "reward/fit" in sourced.metrics
    try:
        nemo_rlhf.train(hf, reward_fn=_rising, prompts=["a "], config=config("ppo", "sourced", *rollouts, sources))
        raise AssertionError("two rewards were taken")
    except ValueError as error:
        assert "reward.sources is set in the configuration and reward_fn given in Python" in str(error)
    for name, checkpoint in (("untouched", untouched.checkpoint), ("learned", learned.checkpoint)):
        assert cli.main(["convert", "export", str(checkpoint), str(root / f"{name}_hf")]) == 0
    prompts = ["--prompts", str(Path(hf).parent / "prompts.jsonl"), "--out", str(root / "ours.jsonl")]
    sampling = ["generation.temperature=0", "generation.max_new_tokens=12", "generation.num_slots=4"]
    assert cli.main(["generate", str(learned.checkpoint), *prompts, *sampling]) == 0
    return {"sft_loss": untouched.metrics["loss"], "ppo_after_sft": dict(after.metrics)}


def _rising(output_ids: list[list[int]], **rest: Any) -> list[list[float]]:
    """0.1 for the first token of a response, 0.2 for the second, ..."""
    return [[0.1 * (place + 1) for place in range(len(ids))] for ids in output_ids]


def other_data(_: Any) -> str:
    """What ranks say that have read other prompts."""
    from nemo_rlhf.cli.run_directory import origin
    from nemo_rlhf.config import load
    from nemo_rlhf.parallel import state
    from nemo_rlhf.types import Prompt

    state.initialize(1, 1, 0)
    config = load("sft", ["model.restore_from=m", "exp_manager.explicit_log_dir=r", "data.train=t"])
    rank = torch.distributed.get_rank()
    same = origin(config, {"training": [Prompt((1, 2), "a")]}, {})
    assert set(same["data"]) == {"training"}
    try:
        origin(config, {"training": [Prompt((1, 2 + rank), "a")]}, {})
    except ValueError as error:
        return str(error)
    return "nothing"
