"""Every plan that the software can run, which of them fit, and which of those is fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nemo_rlhf.config.plan import PlanConfig
from nemo_rlhf.launch.memory import GIB, host_bytes, peak, phases
from nemo_rlhf.launch.parameters import Cut
from nemo_rlhf.launch.time import samples_per_hour
from nemo_rlhf.launch.work import ONLINE, Plan, Work

MICRO_BATCHES = (1, 2, 4, 8, 16)
SLOTS = (8, 16, 32, 64, 128, 256, 512, 1024)
VALIDATION_SLOTS = 32  # the default of generation.num_slots
MOST_NODES = 1024  # that are tried when nothing fits


@dataclass(frozen=True)
class Proposal:
    """A plan, what its fullest GPU holds at most (bytes), that GPU's pipeline stage, and its speed."""

    plan: Plan
    peak: int
    stage: int
    samples_per_hour: float


def budget(work: Work) -> int:
    """Bytes of a GPU that a plan may take."""
    return int((work.cluster.memory_gib - work.cluster.reserve_gib) * GIB)


def _host(work: Work) -> float:
    return work.cluster.host_memory_gib * GIB


def best_plans(work: Work, count: int) -> list[Proposal]:
    """The fastest plans that fit, the fastest first, each with another TP x PP x EP; none where nothing fits."""
    best: dict[Cut, Proposal] = {}
    for cut in cuts(work):
        for plan in plans(work, cut):
            if cut in best and samples_per_hour(work, plan) <= best[cut].samples_per_hour:
                continue
            size, stage = peak(work, plan)
            if size <= budget(work) and host_bytes(work, plan) <= _host(work):
                best[cut] = Proposal(plan, size, stage, samples_per_hour(work, plan))
    return sorted(best.values(), key=lambda proposal: -proposal.samples_per_hour)[:count]


def cuts(work: Work) -> Iterator[Cut]:
    """The cuts that the models and the batch can be divided by. Tensor parallelism stays inside a node; sequence
    parallelism goes with it, as it costs nothing."""
    asked, cluster = work.config.plan, work.cluster
    world = cluster.nodes * cluster.gpus_per_node
    for tp in _divisors(cluster.gpus_per_node, asked.tensor_model_parallel_size):
        for pp in _divisors(world // tp, asked.pipeline_model_parallel_size):
            dp = world // tp // pp
            if asked.global_batch_size % dp or work.samples % dp:
                continue
            for ep in _divisors(tp * dp, asked.expert_model_parallel_size):
                cut = Cut(tp, pp, dp, ep, sequence_parallel=tp > 1)
                if _fits_models(work, cut):
                    yield cut


def _divisors(number: int, only: int | None) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0 and only in (None, value)]


def _fits_models(work: Work, cut: Cut) -> bool:
    """What ``parallel.gpt``, ``parallel.experts`` and ``parallel.state`` ask of a cut."""
    if cut.ep > 1 and (not work.model.architecture.num_experts or (cut.tp % cut.ep and cut.ep % cut.tp)):
        return False
    for model in work.models:
        what = model.architecture
        dense = any(not what.is_sparse(layer) for layer in range(what.num_layers))
        sizes = [what.num_attention_heads, what.num_query_groups, *([what.ffn_hidden_size] if dense else [])]
        if any(size % cut.tp for size in sizes) or what.num_layers % cut.pp:
            return False
        if what.num_experts % cut.ep:
            return False
    return True


def plans(work: Work, cut: Cut) -> Iterator[Plan]:
    """All ways to run a cut: what is recomputed, generated together, and kept on the device."""
    asked = work.config.plan
    share = asked.global_batch_size // cut.dp
    sizes = MICRO_BATCHES if asked.micro_batch_size is None else (asked.micro_batch_size,)
    for size in (size for size in sizes if share % size == 0):
        for recompute in (None, "selective", "full"):
            for slots in _slots(work, cut):
                plain = Plan(cut, size, recompute, slots)
                yield from _residences(work, plain) if work.reference is not None else [plain]


def _slots(work: Work, cut: Cut) -> list[int]:
    algorithm = work.config.plan.algorithm
    if algorithm not in ONLINE:
        return [VALIDATION_SLOTS if algorithm == "ilql" else 0]
    most = work.samples // cut.dp
    return [slots for slots in SLOTS if cut.pp <= slots <= most] or [max(1, most)]


def _residences(work: Work, plan: Plan) -> Iterator[Plan]:
    idle = [(), ("optimizer",)]
    if work.critic is not None:
        idle += [("critic",), ("optimizer", "critic")]
    for reference in ("resident", "offload", "swap"):
        for offload in idle:
            for reward_model in ("resident", "swap") if work.reward_model is not None else (None,):
                yield replace(plan, reference=reference, offload=offload, reward_model=reward_model)


def why_nothing_fits(work: Work) -> str:
    """One sentence: what is too large, and what would make it fit."""
    cluster, asked = work.cluster, work.config.plan
    machines = f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.memory_gib:g} GiB"
    candidates = [_leanest(work, cut) for cut in cuts(work)]
    if not candidates:
        return (
            f"{asked.model} cannot be cut for {machines}: layers, heads, query groups and the samples of a batch have "
            "to be divisible by what shares them; change the number of nodes, plan.global_batch_size or given sizes."
        )
    smallest = min(candidates, key=lambda plan: peak(work, plan)[0])
    size, stage = peak(work, smallest)
    name, rows = max(phases(work, smallest, stage).items(), key=lambda item: sum(item[1].values()))
    largest = max(rows, key=lambda row: rows[row])
    cut, nodes = smallest.cut, _enough_nodes(work)
    instead = f"{nodes} nodes would do" if nodes else f"no number of nodes up to {MOST_NODES} would do"
    if size <= budget(work):
        reason = f"what its GPUs cannot hold is more than cluster.host_memory_gib={cluster.host_memory_gib:g} of a node"
    else:
        reason = (
            f"TP{cut.tp} x PP{cut.pp} x DP{cut.dp} with all that can be recomputed or offloaded still takes "
            f"{size / GIB:.0f} GiB a GPU in {name} ({rows[largest] / GIB:.0f} GiB of it {largest}), and "
            f"{budget(work) / GIB:.0f} GiB are free"
        )
    return f"{asked.algorithm} of {asked.model} does not fit on {machines}: {reason}; {instead}."


def _leanest(work: Work, cut: Cut) -> Plan:
    """The plan of a cut that takes the least of a GPU."""
    plain = Plan(cut, work.config.plan.micro_batch_size or 1, "full", _slots(work, cut)[0])
    if work.reference is None:
        return plain
    idle = ("optimizer",) if work.critic is None else ("optimizer", "critic")
    reward_model = "swap" if work.reward_model is not None else None
    # a swap's second copy may be what a node has no room for
    options = [replace(plain, reference=way, offload=idle, reward_model=reward_model) for way in ("offload", "swap")]
    return min(options, key=lambda plan: (peak(work, plan)[0], host_bytes(work, plan)))


def _enough_nodes(work: Work) -> int | None:
    for nodes in range(work.cluster.nodes + 1, MOST_NODES + 1):
        larger = replace(work, config=PlanConfig(work.config.plan, replace(work.cluster, nodes=nodes)))
        may_fit = any(peak(larger, _leanest(larger, cut))[0] <= budget(larger) for cut in cuts(larger))
        if may_fit and best_plans(larger, 1):
            return nodes
    return None
