"""Plans for people and for programs: tables of memory and time, and the yaml file that a command takes."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from nemo_rlhf.config.scalars import to_yaml
from nemo_rlhf.launch.memory import GIB, host_bytes, phases
from nemo_rlhf.launch.parameters import num_parameters
from nemo_rlhf.launch.search import Proposal, budget
from nemo_rlhf.launch.time import seconds
from nemo_rlhf.launch.work import ONLINE, Plan, Work

WIDTH = 140
_ROWS = (
    "weights",
    "gradients",
    "optimizer",
    "critic weights",
    "critic gradients",
    "critic optimizer",
    "weights being moved",
    "reference",
    "reward model",
    "KV cache",
    "activations",
    "logits",
    "temporaries",
)


def show(work: Work, proposals: list[Proposal]) -> str:
    """The plans, best first, and what the best one takes on its fullest GPU."""
    best = proposals[0]
    parts = [
        _title(work),
        _drawn(_summary(work, proposals)),
        f"Plan 1, GiB on a GPU of pipeline stage {best.stage}, by phase:",
        _drawn(_memory(work, best)),
        f"Plan 1, seconds of a step: {', '.join(f'{k} {v:.1f}' for k, v in seconds(work, best.plan).items())}.",
    ]
    if waiting := host_bytes(work, best.plan):
        parts.append(f"Plan 1 keeps {waiting / GIB:.0f} GiB in the memory of each node.")
    return "\n\n".join(parts) + "\n"


def _drawn(table: Table) -> str:
    console = Console(width=WIDTH, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines() if line.strip())


def _title(work: Work) -> str:
    asked, cluster = work.config.plan, work.cluster
    billions = num_parameters(work.model.architecture) / 1e9
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus_per_node} GPUs"
    batch = f"{asked.global_batch_size} samples an optimizer step"
    if asked.algorithm in ONLINE:
        batch = f"{work.samples} samples a step, {batch}"
    return (
        f"{asked.algorithm} of {asked.model} ({billions:.1f} billion parameters, {asked.precision}) on {nodes}, "
        f"of which {budget(work) / GIB:.1f} of {cluster.memory_gib:g} GiB are used at most.\n"
        f"Prompts of {asked.prompt_tokens} and responses of {asked.response_tokens} tokens, {batch}."
    )


def _table(*headings: str) -> Table:
    table = Table(box=box.MARKDOWN, header_style="")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.columns[0].justify = "left"
    return table


def _summary(work: Work, proposals: list[Proposal]) -> Table:
    generates, online = proposals[0].plan.slots > 0, work.reference is not None
    table = _table(
        "plan",
        *("TP", "PP", "DP", "EP", "micro-batch", "recompute"),
        *(["slots"] if generates else []),
        *(["in host memory while idle"] if online else []),
        *("GiB a GPU", "s a step", "samples/h"),
    )
    for number, proposal in enumerate(proposals, 1):
        plan, cut = proposal.plan, proposal.plan.cut
        table.add_row(
            str(number),
            *map(str, (cut.tp, cut.pp, cut.dp, cut.ep, plan.micro_batch_size, plan.recompute or "nothing")),
            *([str(plan.slots)] if generates else []),
            *([_away(plan)] if online else []),
            f"{proposal.peak / GIB:.1f}",
            f"{3600 * work.samples / proposal.samples_per_hour:.1f}",
            f"{proposal.samples_per_hour:.0f}",
        )
    return table


def _away(plan: Plan) -> str:
    names = list(plan.offload)
    if plan.reference != "resident":
        names.append("reference" if plan.reference == "offload" else "reference (swap)")
    if plan.reward_model == "swap":
        names.append("reward model")
    return ", ".join(names) or "nothing"


def _memory(work: Work, proposal: Proposal) -> Table:
    found = phases(work, proposal.plan, proposal.stage)
    table = _table("", *found)
    present = {name for rows in found.values() for name in rows}
    assert present <= set(_ROWS)
    for name in _ROWS:
        if name in present:
            table.add_row(name, *(f"{rows[name] / GIB:.2f}" if name in rows else "" for rows in found.values()))
    table.add_row("total", *(f"{sum(rows.values()) / GIB:.2f}" for rows in found.values()))
    return table


def overrides(work: Work, proposal: Proposal) -> dict[str, Any]:
    """The plan in the keys of the command that runs it."""
    asked, cluster, plan, cut = work.config.plan, work.cluster, proposal.plan, proposal.plan.cut
    found: dict[str, Any] = {
        "trainer": {"devices": cluster.gpus_per_node, "num_nodes": cluster.nodes, "precision": asked.precision},
        "model": {
            "tensor_model_parallel_size": cut.tp,
            "pipeline_model_parallel_size": cut.pp,
            "expert_model_parallel_size": cut.ep,
            "sequence_parallel": cut.sequence_parallel,
            "micro_batch_size": plan.micro_batch_size,
            "global_batch_size": asked.global_batch_size,
            "activations_checkpoint_granularity": plan.recompute,
        },
    }
    rounds = {"num_prompts": asked.num_prompts, "samples_per_prompt": asked.samples_per_prompt}
    if asked.algorithm == "ppo":
        away = [*plan.offload, *(["reference"] if plan.reference == "offload" else [])]
        found["ppo"] = {
            **rounds,
            "epochs": asked.epochs,
            "advantage": asked.advantage,
            "reference": "swap" if plan.reference == "swap" else "resident",
            "offload": away,
        }
    if asked.algorithm == "rft":
        found["rft"] = {**rounds, "improve_steps": asked.epochs}
    if asked.algorithm == "ilql":
        found["ilql"] = {"value_trunk": asked.value_trunk}
    if plan.slots:
        found["generation"] = {"max_new_tokens": asked.response_tokens, "num_slots": plan.slots}
    length = asked.prompt_tokens + asked.response_tokens
    found["data"] = (
        {"max_prompt_length": asked.prompt_tokens} if asked.algorithm in ONLINE else {"max_sequence_length": length}
    )
    return found


def as_yaml(work: Work, proposal: Proposal) -> str:
    """A file for ``--config`` of the command that is planned for."""
    asked = work.config.plan
    gib = proposal.peak / GIB
    lines = [
        f"# Planned for {asked.algorithm} of {asked.model}: at most {gib:.1f} GiB a GPU,",
        f"# about {proposal.samples_per_hour:.0f} samples an hour. To be used with",
        f"#   nemo-rlhf {asked.algorithm} --config THIS_FILE model.restore_from=... key=value ...",
    ]
    if asked.critic is not None:
        lines.append(f"# It counts on model.critic.restore_from being {asked.critic}.")
    if asked.reward_model is not None:
        lines.append(
            f"# It counts on reward.sources holding {asked.reward_model}: {{kind: model, residence: "
            f"{proposal.plan.reward_model}, ...}}."
        )
    return "\n".join(lines) + "\n" + to_yaml(overrides(work, proposal))
