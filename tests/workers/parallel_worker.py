"""What the tests of the parallel room run on every rank: jobs on the real models, each under a cut of the same world.

A job is (name, cut, function, arguments); the functions are those of this module. They return plain numbers and host
tensors, and the tests compare these. The test's own process runs the jobs of a world of one.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.optim import OptimConfig, SchedConfig
from nemo_rlhf.config.schema import ModelConfig
from nemo_rlhf.losses.ppo import policy_loss, value_loss
from nemo_rlhf.losses.sft import sft_loss
from nemo_rlhf.models.base import MegatronModel
from nemo_rlhf.models.critic import CriticModel
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.models.reference import ResidentReference, SwappedReference
from nemo_rlhf.parallel import checkpoint, manifest, state
from nemo_rlhf.parallel.gpt import GPT
from nemo_rlhf.parallel.logprobs import vocab_parallel_logprobs
from nemo_rlhf.parallel.schedule import Loss, Microbatch, forward_backward

SEED = 11
VOCAB = 131  # padded to 136 at TP1 and to 144 at TP2
TEMPERATURE, ENTROPY_COEF = 0.8, 0.01
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, VALUE_CLIP = 0.2, 0.3, 3.0, 0.2
OPTIM = OptimConfig(
    lr=2e-3,
    betas=[0.9, 0.95],
    eps=1e-6,
    weight_decay=0.1,
    clip_grad=0.5,
    sched=SchedConfig(name="cosine", warmup_steps=2, min_lr=5e-4),
)
TOTAL_STEPS = 4


@dataclass(frozen=True)
class Cut:
    """TP x PP of the world, what is left is DP."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True)
class Job:
    name: str
    cut: Cut
    function: str
    arguments: dict[str, Any]


def run_jobs(jobs: Sequence[Job]) -> dict[str, Any]:
    if int(os.environ["WORLD_SIZE"]) > 1:
        gc.freeze()  # megatron collects garbage at every save: half a second among all that was imported
    results = {}
    for job in jobs:
        state.initialize(job.cut.tp, job.cut.pp, SEED)
        try:
            results[job.name] = globals()[job.function](cut=job.cut, **job.arguments)
        except Exception as error:
            raise AssertionError(f"job {job.name} failed") from error
    return results


# ---- the batch, its losses, and models


@dataclass(frozen=True)
class Batch:
    """Whole batch [B, S] on the host. ``fields`` are random: losses take them as they come."""

    tokens: Tensor
    mask: Tensor
    lengths: Tensor
    fields: dict[str, Tensor]

    @property
    def selected(self) -> int:
        return int(self.mask.sum())


def make_batch() -> Batch:
    """Seven rows, which no number of ranks or size of a microbatch divides, of very different lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([24, 5, 17, 9, 23, 12, 3])
    tokens = torch.randint(0, VOCAB, (7, 24), generator=generator)
    places = torch.arange(24)
    tokens = torch.where(places < lengths[:, None], tokens, 0)
    prompts = torch.tensor([3, 2, 9, 1, 4, 6, 1])
    mask = (places >= prompts[:, None]) & (places < lengths[:, None])
    mask[0, 10:13] = False  # what another speaker said
    normal = {name: torch.randn(7, 24, generator=generator) for name in ("logprobs", "advantages", "values", "returns")}
    normal["logprobs"] = -5.2 + 0.3 * normal["logprobs"]  # ratios on both sides of the clips
    normal["values"] = 0.3 * normal["values"]
    return Batch(tokens, mask, lengths, normal)


def loss_of(kind: str, normalizer: int) -> Loss:
    """The closure that PPO and SFT hand to the schedule."""

    def loss(gpt: GPT, hidden: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        everything = torch.ones_like(batch.selected, dtype=torch.bool)
        if kind == "critic":
            return value_loss(
                gpt.values(hidden, batch.tokens, batch.selected),
                batch.fields["values"],
                batch.fields["returns"],
                everything,
                value_clip=VALUE_CLIP,
                normalizer=normalizer,
            )
        if kind == "sft":
            logprobs, _ = gpt.vocab_logprobs(hidden, batch.tokens, batch.selected)
            return sft_loss(logprobs, everything, normalizer=normalizer)
        logprobs, entropy = gpt.vocab_logprobs(hidden, batch.tokens, batch.selected, TEMPERATURE)
        return policy_loss(
            logprobs,
            batch.fields["logprobs"],
            batch.fields["advantages"],
            everything,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            dual_clip=DUAL_CLIP,
            entropy=entropy,
            entropy_coef=ENTROPY_COEF,
            normalizer=normalizer,
        )

    return loss


def role_of(kind: str) -> type[MegatronModel]:
    return CriticModel if kind == "critic" else PolicyModel


def config_of(
    cut: Cut, directory: Path, micro_batch: int = 7, recompute: str | None = None, **more: Any
) -> ModelConfig:
    return ModelConfig(
        restore_from=str(directory),
        tensor_model_parallel_size=cut.tp,
        pipeline_model_parallel_size=cut.pp,
        sequence_parallel=cut.sequence_parallel,
        micro_batch_size=micro_batch,
        activations_checkpoint_granularity=recompute,
        optim=OPTIM,
        **more,
    )


def open_model(kind: str, cut: Cut, directory: Path, precision: str = "32", **config: Any) -> Any:
    model = open_role(role_of(kind), config_of(cut, directory, **config), str(directory), precision, SEED)
    if hasattr(model.gpt, "value_head") and not model.gpt.value_head.weight.any():
        # a new head is zero, which would hide the trunk
        with torch.no_grad():
            model.gpt.value_head.weight.copy_(head_weight())
    return model


def head_weight() -> Tensor:
    return torch.randn(1, 64, generator=torch.Generator().manual_seed(SEED)) / 8


def learn(model: MegatronModel, kind: str, steps: int) -> list[dict[str, float]]:
    """Logged numbers of each step, per token, and the norm of the gradient."""
    batch = make_batch()
    logged = []
    for _ in range(steps):
        microbatches = model.cut(batch.tokens, batch.mask, batch.lengths, range(len(batch.lengths)), batch.fields)
        sums, norm = model.learn(microbatches, loss_of(kind, batch.selected))
        sums.pop("ratio/max_deviation", None)
        assert model.learner is not None
        means = {name: value / batch.selected for name, value in sums.items()}
        logged.append({**means, "norm": norm, "lr": model.learner.last_lr})
    return logged


def evaluate(model: Any, kind: str) -> Tensor:
    """What the model says of the selected tokens [results, N], on every rank alike."""
    batch = make_batch()
    microbatches = model.cut(batch.tokens, batch.mask, batch.lengths, range(len(batch.lengths)))
    if kind == "critic":
        results = [model.values(microbatches, batch.tokens)]
    else:
        results = list(model.logprobs(microbatches, TEMPERATURE, batch.tokens))
    return torch.stack([result[batch.mask] for result in results])


def whole_name(model: GPT, name: str) -> str:
    """A parameter's name in the whole model: layers are numbered from the first stage on."""
    if not name.startswith("decoder.layers."):
        return name
    _, _, index, inner = name.split(".", 3)
    return f"decoder.layers.{model.decoder.layers[int(index)].layer_number - 1}.{inner}"


def snapshot(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def padding_is_zero(model: GPT) -> bool:
    start, _ = model.vocab_range()
    real = max(0, VOCAB - start)
    weights = [model.embedding.word_embeddings.weight] if model.pre_process else []
    weights += [model.output_weight()] if model.post_process and model.role == "policy" else []
    return all(bool((weight[real:] == 0).all()) for weight in weights)


# ---- jobs: learning


def train(cut: Cut, kind: str, directory: Path, micro_batch: int = 2, recompute: str | None = None) -> dict[str, Any]:
    """Three optimizer steps, and what the weights say before and after them."""
    model = open_model(kind, cut, directory, micro_batch=micro_batch, recompute=recompute)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    before = evaluate(model, kind)
    logged = learn(model, kind, 3)
    assert padding_is_zero(model.gpt), "rows of the padding have learned"
    return {"before": before, "steps": logged, "after": evaluate(model, kind)}


def norm_gradients(cut: Cut, directory: Path) -> dict[str, Tensor]:
    """Gradients of the norms' weights in the first step."""
    model = open_model("sft", cut, directory)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    batch = make_batch()
    microbatches = model.cut(batch.tokens, batch.mask, batch.lengths, range(len(batch.lengths)), batch.fields)
    model.learner.zero_grad()
    forward_backward(model.learner.ddp, microbatches, loss_of("sft", batch.selected))
    return {
        whole_name(model.gpt, name): parameter.main_grad.clone()
        for name, parameter in model.gpt.named_parameters()
        if "layernorm" in name
    }


def random_start(cut: Cut, kind: str, directory: Path) -> Tensor:
    return evaluate(open_model(kind, cut, directory, init="random"), kind)


# ---- jobs: log-probabilities


def split_logprobs(cut: Cut, vocab_size: int, chunk: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Values and gradients over this world's shards; gradients are summed or joined as the model's regions do."""
    hidden, weight, targets, grads = logprob_inputs(vocab_size, dtype)
    rows = weight.size(0) // state.tp_size()
    hidden, mine = hidden.requires_grad_(), weight[state.tp_rank() * rows :][:rows].clone().requires_grad_()
    logprobs, entropy = vocab_parallel_logprobs(
        hidden, mine, targets, vocab_size=vocab_size, temperature=TEMPERATURE, chunk_tokens=chunk
    )
    (logprobs * grads[0] + entropy * grads[1]).sum().backward()
    dist.all_reduce(hidden.grad, group=state.tp_group())
    parts = [torch.empty_like(mine) for _ in range(state.tp_size())]
    dist.all_gather(parts, mine.grad, group=state.tp_group())
    return {
        "logprobs": logprobs.detach(),
        "entropy": entropy.detach(),
        "hidden": hidden.grad,
        "weight": torch.cat(parts),
    }


def logprob_inputs(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [29, 16]; weight [padded, 16] whose padding would win every softmax; targets [29]; gradients [2, 29]."""
    generator = torch.Generator().manual_seed(7)
    padded = -(-vocab_size // 16) * 16
    hidden, weight = torch.randn(29, 16, generator=generator), torch.randn(padded, 16, generator=generator)
    weight[vocab_size:] *= 10
    targets = torch.randint(0, vocab_size, (29,), generator=generator)
    targets[0], targets[1] = 0, vocab_size - 1
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(2, 29, generator=generator)


# ---- jobs: memory


def train_offloaded(cut: Cut, kind: str, directory: Path, precision: str) -> dict[str, Any]:
    """Two steps, with and without the optimizer and the weights leaving the device before, between and after."""
    results: dict[str, Any] = {}
    for offload in (False, True):
        model = open_model(kind, cut, directory, precision)
        model.make_trainable(OPTIM, TOTAL_STEPS)
        logged = []
        for _ in range(2):
            if offload:
                results["freed"] = _away_and_back(model)
            logged += learn(model, kind, 1)
        if offload:
            results["freed"] = _away_and_back(model)
        results["offloaded" if offload else "resident"] = logged, evaluate(model, kind)
    return results


def _away_and_back(model: MegatronModel) -> dict[str, bool]:
    """Send everything away, tell whether its memory is free, and bring it back."""
    assert model.learner is not None
    optimizers = [part.optimizer for part in model.learner.optimizer.chained_optimizers if part.optimizer is not None]
    moments = [v for o in optimizers for e in o.state.values() for v in e.values() if isinstance(v, Tensor) and v.dim()]
    main = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    gradients = [p.main_grad for p in model.gpt.parameters()]
    model.learner.offload()
    model.weights_out()
    groups = {"moments": moments, "main": main, "gradients": gradients, "weights": list(model.gpt.parameters())}
    freed = {name: all(t.untyped_storage().nbytes() == 0 for t in tensors) for name, tensors in groups.items()}
    assert model.weights_are_out
    model.weights_back()
    model.learner.restore()
    assert not model.weights_are_out
    return freed


def references(cut: Cut, directory: Path) -> dict[str, Any]:
    """Reference log-probabilities before and after the policy has learned, by each kind of reference."""
    policy = open_model("policy", cut, directory, micro_batch=2)  # the last row goes alone: another path of matmul
    policy.make_trainable(OPTIM, TOTAL_STEPS)
    batch = make_batch()
    kinds = {
        "resident": ResidentReference(policy, lambda: open_model("policy", cut, directory), offload=False),
        "offloaded": ResidentReference(policy, lambda: open_model("policy", cut, directory), offload=True),
        "swapped": SwappedReference(policy),
    }

    def say() -> dict[str, Tensor]:
        microbatches = policy.cut(batch.tokens, batch.mask, batch.lengths, range(len(batch.lengths)))
        return {name: kind.logprobs(microbatches, TEMPERATURE, batch.tokens) for name, kind in kinds.items()}

    start = evaluate(policy, "policy")[0]
    first = say()
    logged = learn(policy, "policy", 2)
    weights = snapshot(dict(policy.gpt.named_parameters()))
    moved = evaluate(policy, "policy")[0]
    second = say()
    kept = all(torch.equal(weights[name], value) for name, value in policy.gpt.named_parameters())
    logged += learn(policy, "policy", 1)
    third = say()
    offloaded = kinds["offloaded"]
    assert isinstance(offloaded, ResidentReference) and offloaded.model.weights_are_out
    return {
        "policy": start,
        "said": [{name: value[batch.mask] for name, value in said.items()} for said in (first, second, third)],
        "policy_moved": float((moved - start).abs().max()),
        "policy_kept": kept,
        "steps": logged,
    }


# ---- jobs: checkpoints


def fresh(kind: str, cut: Cut, architecture: Architecture, precision: str = "32") -> Any:
    """A model whose every weight is NaN: what a checkpoint does not fill shows."""
    return role_of(kind)(config_of(cut, Path("nowhere")), architecture, precision)


def store(cut: Cut, kind: str, source: Path, target: Path) -> Tensor:
    """Open ``source``, in whatever format and cut it is, and store it under this cut."""
    model = open_model(kind, cut, source)
    checkpoint.save_model(model.gpt, target)
    return evaluate(model, kind)


def weights_of(cut: Cut, kind: str, source: Path) -> dict[str, Tensor]:
    """Every parameter of the model at ``source``, without the vocabulary's padding."""
    model = open_model(kind, cut, source)
    assert cut.tp == cut.pp == 1 and padding_is_zero(model.gpt)
    return {
        name: value.detach()[:VOCAB].clone()
        if "embedding" in name or "output_layer" in name
        else value.detach().clone()
        for name, value in model.gpt.named_parameters()
    }


def train_and_save(cut: Cut, kind: str, directory: Path, target: Path, precision: str = "32") -> list[dict[str, float]]:
    """Two steps, a checkpoint, and the two steps that follow; those last ones are returned."""
    model = open_model(kind, cut, directory, precision)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    learn(model, kind, 2)
    checkpoint.write_atomically(target, lambda path: _save(model, path))
    return learn(model, kind, 2)


def _save(model: MegatronModel, directory: Path) -> None:
    checkpoint.save_model(model.gpt, directory / "model")
    model.save_training_state(directory / "training")


def resume(cut: Cut, kind: str, target: Path, precision: str = "32") -> list[dict[str, float]]:
    model = fresh(kind, cut, Architecture.load(target / "model"), precision)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    checkpoint.load_model(model.gpt, target / "model")
    model.load_training_state(target / "training")
    logged = learn(model, kind, 2)
    assert padding_is_zero(model.gpt), "rows of the padding have learned"
    return logged


def save_unused(cut: Cut, kind: str, directory: Path, target: Path) -> dict[str, Any]:
    """An optimizer that has not stepped can be saved, and goes on from there like one that was never stored."""
    model = open_model(kind, cut, directory)
    model.make_trainable(OPTIM, TOTAL_STEPS)
    checkpoint.write_atomically(target, lambda path: _save(model, path))
    return {"saved": learn(model, kind, 2), "loaded": resume(cut, kind, target)}


def message(action: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """What ``action`` raises."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")


def refusals(cut: Cut, directory: Path, changes: dict[str, Any], target: Path) -> dict[str, str]:
    """Sentences with which models of other architectures refuse the checkpoint at ``target``."""
    from dataclasses import replace

    stored = Architecture.load(target / "model")
    said = {}
    for name, change in changes.items():
        model = fresh("policy", cut, replace(stored, **{name: change}))
        said[name] = message(lambda model=model: checkpoint.load_model(model.gpt, target / "model"))
    critic = open_model("critic", cut, directory)
    critic.make_trainable(OPTIM, TOTAL_STEPS)
    said["a critic's optimizer"] = message(lambda: critic.load_training_state(target / "training"))
    critic = fresh("critic", cut, stored)
    said["a critic without its head"] = message(lambda: checkpoint.load_model(critic.gpt, target / "model"))
    return said


def failing_writes(cut: Cut, directory: Path) -> dict[str, Any]:
    """What ``write_atomically`` leaves behind when ranks fail. ``directory`` is empty."""
    path = directory / "step"

    def write_good(partial: Path) -> None:
        (partial / f"rank_{dist.get_rank()}").write_text("old")
        dist.barrier()

    def fail_on(rank: int, error: Exception) -> Callable[[Path], None]:
        def write(partial: Path) -> None:
            (partial / f"rank_{dist.get_rank()}").write_text("new")
            dist.barrier()
            if dist.get_rank() == rank:
                raise error

        return write

    checkpoint.write_atomically(path, write_good)
    checkpoint.verify(path)
    results: dict[str, Any] = {"messages": {}, "left": {}}
    for rank in range(dist.get_world_size()):
        for error in (OSError(28, "No space left on device"), RuntimeError("the writer died")):
            name = f"{type(error).__name__} on rank {rank}"
            results["messages"][name] = message(
                lambda rank=rank, error=error: checkpoint.write_atomically(path, fail_on(rank, error)),
                checkpoint.SaveError,
            )
            dist.barrier()
            results["left"][name] = sorted(p.name for p in directory.iterdir()), (path / "rank_0").read_text()
            checkpoint.verify(path)
    checkpoint.write_atomically(path, fail_on(-1, OSError()))
    results["then"] = sorted(p.name for p in directory.iterdir()), (path / "rank_0").read_text()
    return results


def damage(cut: Cut, whole: Path, work: Path) -> dict[str, str]:
    """Sentences about copies of the checkpoint at ``whole``, each damaged in one way."""
    checkpoint.verify(whole)
    name = max(whole.rglob("*.distcp"), key=lambda path: path.stat().st_size).relative_to(whole)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    damages: dict[str, tuple[Callable[[Path], Any], Path]] = {
        "flipped": (flip, name),
        "truncated": (truncate, name),
        "missing": (Path.unlink, name),
        "without manifest": (Path.unlink, Path(manifest.MANIFEST)),
    }
    said = {"file": str(name)}
    for kind, (do, file) in damages.items():

        def make(copy: Path = work / kind, do: Callable[[Path], Any] = do, file: Path = file) -> None:
            shutil.copytree(whole, copy)
            do(copy / file)

        checkpoint.on_rank_zero(make)
        said[kind] = message(lambda kind=kind: checkpoint.verify(work / kind))
    return said
