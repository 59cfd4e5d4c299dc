"""What every GPU holds in each phase of a step, and what waits in the memory of its node."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from nemo_rlhf.launch.activations import (
    Passage,
    cache_bytes,
    evaluation_bytes,
    prefill_bytes,
    prefill_tokens,
    sampling_bytes,
    update_peak,
)
from nemo_rlhf.launch.parameters import Cut, RoleBytes, role_bytes
from nemo_rlhf.launch.work import ONLINE, Model, Plan, Work

GIB = 2**30
Rows = dict[str, int]  # bytes by name


@lru_cache(maxsize=100_000)
def held(model: Model, cut: Cut, stage: int, trainable: bool) -> RoleBytes:
    return role_bytes(model.architecture, model.role, cut, stage, model.itemsize, trainable=trainable)


@lru_cache(maxsize=100_000)
def learning(model: Model, cut: Cut, stage: int, passage: Passage, microbatches: int) -> tuple[int, int, int]:
    """Bytes of activations, logits and other temporaries while ``model`` learns."""
    return update_peak(model.architecture, model.role, cut, stage, passage, microbatches, model.itemsize)


@lru_cache(maxsize=100_000)
def evaluating(models: tuple[Model, ...], cut: Cut, stage: int, passage: Passage) -> int:
    return max(evaluation_bytes(m.architecture, m.role, cut, stage, passage, m.itemsize) for m in models)


@lru_cache(maxsize=100_000)
def generating(model: Model, cut: Cut, stage: int, slots: int, prompt: int, longest: int) -> tuple[int, int, int]:
    """Bytes of the key-value cache, and of drawing tokens or the largest prefill, whichever is more."""
    what, size = model.architecture, model.itemsize
    cache = cache_bytes(what, model.role, cut, slots, longest, size)
    tokens = prefill_tokens(cut, slots, prompt, longest)
    drawing = sampling_bytes(what, model.role, cut, slots, tokens, size) if stage == cut.pp - 1 else 0
    prefill = prefill_bytes(what, cut, tokens, size)
    return (cache, 0, prefill) if prefill > drawing else (cache, drawing, 0)


def stages(work: Work, pp: int) -> Iterable[int]:
    """Pipeline stages of which one holds the most. Between the ends, where layers are alike, that is the first."""
    alike = all(not model.architecture.dense_layers for model in work.models)
    return sorted({0, min(1, pp - 1), pp - 1}) if alike else range(pp)


def phases(work: Work, plan: Plan, stage: int) -> dict[str, Rows]:
    """Bytes on a GPU of pipeline stage ``stage``, by phase and by what they are."""
    found = {"load": _load(work, plan, stage)}
    if plan.slots:
        name = "rollout" if work.config.plan.algorithm in ONLINE else "validation"
        found[name] = _rollout(work, plan, stage)
    if work.reward_model is not None:
        found["score"] = _evaluate(work, plan, stage, [work.reward_model], scoring=True)
    if work.reference is not None:
        models = [model for model in (work.model, work.reference, work.critic) if model is not None]
        found["experience"] = _evaluate(work, plan, stage, models, scoring=False)
    found["update"] = _update(work, plan, stage)
    return found


def peak(work: Work, plan: Plan) -> tuple[int, int]:
    """The most bytes that any GPU holds at any time, and the pipeline stage of that GPU."""
    return max(
        (max(sum(rows.values()) for rows in phases(work, plan, stage).values()), stage)
        for stage in stages(work, plan.cut.pp)
    )


def host_bytes(work: Work, plan: Plan) -> int:
    """What waits in a node's memory, at most."""
    most = 0
    for stage in stages(work, plan.cut.pp):
        total = 0
        for model in work.learners:
            mine = held(model, plan.cut, stage, True)
            total += mine.optimizer if "optimizer" in plan.offload else 0
            total += mine.weights if model is work.critic and "critic" in plan.offload else 0
        if work.reference is not None and plan.reference != "resident":
            # a swap has room for both sets of weights
            copies = 2 if plan.reference == "swap" else 1
            total += copies * held(work.reference, plan.cut, stage, plan.reference == "swap").weights
        if work.reward_model is not None and plan.reward_model == "swap":
            total += held(work.reward_model, plan.cut, stage, False).weights
        most = max(most, total)
    return most * work.cluster.gpus_per_node


def _resident(work: Work, plan: Plan, stage: int, *, critic: bool, optimizers: bool, scoring: bool = False) -> Rows:
    """Of the models, whatever the phase does. ``critic``: its weights are needed; ``optimizers``: so are those;
    ``scoring``: so is the reward model."""
    optimizers = optimizers or "optimizer" not in plan.offload
    policy = held(work.model, plan.cut, stage, True)
    rows = {"weights": policy.weights}
    if optimizers:
        rows |= {"gradients": policy.gradients, "optimizer": policy.optimizer}
    if work.critic is not None:
        mine = held(work.critic, plan.cut, stage, True)
        if critic or "critic" not in plan.offload:
            rows["critic weights"] = mine.weights
        if optimizers:
            rows |= {"critic gradients": mine.gradients, "critic optimizer": mine.optimizer}
    if work.reference is not None and plan.reference == "resident":
        rows["reference"] = held(work.reference, plan.cut, stage, False).weights
    if work.reward_model is not None and (scoring or plan.reward_model == "resident"):
        rows["reward model"] = held(work.reward_model, plan.cut, stage, False).weights
    return rows


def _load(work: Work, plan: Plan, stage: int) -> Rows:
    """No moments yet. Either the last learner has its weights twice, as megatron moves them into its buffer, or it has
    its optimizer and the reference is beside it."""
    rows: Rows = {}
    for model, prefix in ((work.model, ""), (work.critic, "critic ")):
        if model is not None:
            mine = held(model, plan.cut, stage, True)
            rows |= {f"{prefix}weights": mine.weights, f"{prefix}gradients": mine.gradients}
            rows[f"{prefix}optimizer"] = mine.optimizer // 3 if model.itemsize == 2 else 0
            last = f"{prefix}optimizer"
    moving = {name: size for name, size in rows.items() if name != last}
    moving["weights being moved"] = held(work.learners[-1], plan.cut, stage, False).weights
    if work.reference is not None and plan.reference != "swap":
        rows["reference"] = held(work.reference, plan.cut, stage, False).weights
    return max(rows, moving, key=lambda candidate: sum(candidate.values()))


def _rollout(work: Work, plan: Plan, stage: int) -> Rows:
    asked = work.config.plan
    cache, drawing, prefill = generating(
        work.model, plan.cut, stage, plan.slots, asked.prompt_tokens, asked.prompt_tokens + asked.response_tokens
    )
    rows = _resident(work, plan, stage, critic=False, optimizers=False)
    return rows | {"KV cache": cache, "logits": drawing, "temporaries": prefill}


def _evaluate(work: Work, plan: Plan, stage: int, models: list[Model], scoring: bool) -> Rows:
    rows = _resident(work, plan, stage, critic=not scoring, optimizers=False, scoring=scoring)
    if not scoring and plan.reference == "offload":
        assert work.reference is not None
        reference = held(work.reference, plan.cut, stage, False).weights
        if "critic" not in plan.offload:
            rows["reference"] = reference
        elif reference > rows.get("critic weights", 0):  # of the two, one is there at a time
            rows.pop("critic weights", None)
            rows["reference"] = reference
    passage = work.passage(plan.micro_batch_size, None)
    return rows | {"temporaries": evaluating(tuple(models), plan.cut, stage, passage)}


def _update(work: Work, plan: Plan, stage: int) -> Rows:
    microbatches = work.config.plan.global_batch_size // plan.cut.dp // plan.micro_batch_size
    passage = work.passage(plan.micro_batch_size, plan.recompute)
    activations, logits, temporaries = max(
        (learning(model, plan.cut, stage, passage, microbatches) for model in work.learners), key=sum
    )
    rows = _resident(work, plan, stage, critic=True, optimizers=True)
    return rows | {"activations": activations, "logits": logits, "temporaries": temporaries}
