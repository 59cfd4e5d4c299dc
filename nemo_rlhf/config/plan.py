"""What ``nemo-rlhf plan`` is asked: a model, an algorithm, lengths and batches, and the machines that are to be had."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_rlhf.config.rules import COUNT, NOT_NEGATIVE, POSITIVE, Rule


@dataclass
class PlanSectionConfig:
    model: str = (
        MISSING  # one that is shipped (see docs/planning.md), a Hugging Face directory or a Megatron checkpoint
    )
    algorithm: str = "ppo"  # "ppo" | "rft" | "ilql" | "sft" | "reward"
    advantage: str = "gae"  # ppo: "gae" with a critic | "rloo" | "grpo" without one
    critic: str | None = None  # ppo: as `model`; null: one of the policy's size
    reward_model: str | None = None  # ppo: as `model`, a reward model in the same job; null: none
    value_trunk: bool = False  # ilql: V and Q heads stand on a trunk of their own
    prompt_tokens: int = 1024  # longest prompt
    response_tokens: int = 1024  # longest response
    num_prompts: int = 512  # ppo, rft: prompts of one step, over all replicas
    samples_per_prompt: int = 1  # ppo, rft: responses to each prompt
    global_batch_size: int = 128  # samples of one optimizer step
    epochs: int = 1  # ppo: passes over a step's samples; rft: its improve_steps
    precision: str = "bf16"  # of weights and activations: "32" | "bf16"
    layer_spec: str = "transformer_engine"  # whose modules layers are made of: "transformer_engine" | "local"
    tensor_model_parallel_size: int | None = None  # plans with this one only; null: whatever is best
    pipeline_model_parallel_size: int | None = None  # the same
    expert_model_parallel_size: int | None = None  # the same
    micro_batch_size: int | None = None  # the same


@dataclass
class ClusterConfig:
    """Bandwidths are of one GPU, one way. The defaults are those of nodes of eight H100 (80 GB)."""

    nodes: int = 1
    gpus_per_node: int = 8
    memory_gib: float = 79.6  # of a GPU
    reserve_gib: float = 6.0  # of it, for the CUDA context, NCCL and fragmentation
    host_memory_gib: float = 1800.0  # of a node, for what is offloaded
    tflops: float = 989.0  # peak of dense matrix products in bf16
    tflops_fp32: float = 67.0  # the same in fp32, without TF32
    utilisation: float = 0.4  # share of it that matrix products reach, communication not counted
    memory_gb_per_s: float = 3350.0  # between a GPU and its memory
    nvlink_gb_per_s: float = 450.0  # between GPUs of a node
    network_gb_per_s: float = 50.0  # between nodes
    host_gb_per_s: float = 25.0  # between a GPU and the memory of its node
    layer_us: float = 400.0  # least microseconds of a layer in a decoding step: launching its kernels


@dataclass
class PlanConfig:
    """Configuration of ``nemo-rlhf plan``."""

    plan: PlanSectionConfig = field(default_factory=PlanSectionConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


_COUNTS = ("prompt_tokens", "response_tokens", "num_prompts", "samples_per_prompt", "global_batch_size", "epochs")
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "micro_batch_size",
)
_OF_ONE = (  # key, default and algorithm
    ("critic", None, "ppo"),
    ("reward_model", None, "ppo"),
    ("advantage", "gae", "ppo"),
    ("value_trunk", False, "ilql"),
)
_CLUSTER = {"nodes": COUNT, "gpus_per_node": COUNT, "host_memory_gib": NOT_NEGATIVE}
_CHOICES = {
    "algorithm": ("ppo", "rft", "ilql", "sft", "reward"),
    "advantage": ("gae", "rloo", "grpo"),
    "precision": ("32", "bf16"),
    "layer_spec": ("transformer_engine", "local"),
}


def check_plan(cfg: PlanConfig) -> None:
    """Raises ValueError for a value out of its range, and for what belongs to another algorithm."""
    plan, cluster = cfg.plan, cfg.cluster
    for name, choices in _CHOICES.items():
        if getattr(plan, name) not in choices:
            raise ValueError(f"plan.{name}={getattr(plan, name)} is not known: choose one of {', '.join(choices)}.")
    for name in (*_COUNTS, *_SIZES):
        if getattr(plan, name) is not None:
            _in_range(f"plan.{name}", getattr(plan, name), COUNT)
    for name, value in vars(cluster).items():
        _in_range(f"cluster.{name}", value, _CLUSTER.get(name, POSITIVE))
    if cluster.utilisation > 1:
        raise ValueError(f"cluster.utilisation={cluster.utilisation} is a share: it must be between 0 and 1.")
    if cluster.reserve_gib >= cluster.memory_gib:
        raise ValueError(
            f"cluster.reserve_gib={cluster.reserve_gib} leaves nothing of cluster.memory_gib={cluster.memory_gib}: "
            "lower it."
        )
    if plan.algorithm == "ppo":
        _check_ppo(plan)
    for name, default, algorithm in _OF_ONE:
        if plan.algorithm != algorithm and getattr(plan, name) != default:
            raise ValueError(
                f"plan.{name}={getattr(plan, name)} has a meaning in {algorithm} only, and plan.algorithm="
                f"{plan.algorithm}: leave it out."
            )


def _check_ppo(plan: PlanSectionConfig) -> None:
    samples = plan.num_prompts * plan.samples_per_prompt
    if samples % plan.global_batch_size:
        raise ValueError(
            f"plan.num_prompts={plan.num_prompts} times plan.samples_per_prompt={plan.samples_per_prompt} gives "
            f"{samples} samples a step, which plan.global_batch_size={plan.global_batch_size} does not divide: change "
            "one of them."
        )
    if plan.advantage == "gae":
        return
    if plan.critic is not None:
        raise ValueError(f"plan.critic={plan.critic} has no use with plan.advantage={plan.advantage}: leave it out.")
    if plan.samples_per_prompt < 2:
        raise ValueError(
            f"plan.advantage={plan.advantage} compares the samples of a prompt, but "
            f"plan.samples_per_prompt={plan.samples_per_prompt}: raise it to 2 or more."
        )


def _in_range(key: str, value: float, rule: Rule) -> None:
    words, holds = rule
    if not holds(value):
        raise ValueError(f"{key}={value} is out of range: it must be {words}.")
