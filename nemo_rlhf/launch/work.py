"""What is to be planned, and a plan for it: plain records that the other modules of this room work on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.config.buckets import bucket_length
from nemo_rlhf.config.plan import ClusterConfig, PlanConfig
from nemo_rlhf.launch.activations import Passage
from nemo_rlhf.launch.parameters import Cut, Role

ITEMSIZE = {"32": 4, "bf16": 2}
ONLINE = ("ppo", "rft")  # algorithms that generate
NUM_Q, HEAD_WIDTH = 2, 2  # of ILQL, the latter times the hidden size


@dataclass(frozen=True, eq=False)
class Model:
    """One role. Compared by identity, so that what is computed of it can be kept."""

    architecture: Architecture
    role: Role
    itemsize: int


@dataclass(frozen=True, eq=False)
class Work:
    """The models of a job and what it does in a step. ``model`` learns; in PPO so does the ``critic``, a ``reference``
    of the model's size stands beside it, and perhaps a ``reward_model``."""

    config: PlanConfig
    model: Model
    critic: Model | None = None
    reference: Model | None = None
    reward_model: Model | None = None

    @property
    def cluster(self) -> ClusterConfig:
        return self.config.cluster

    @property
    def length(self) -> int:
        return self.config.plan.prompt_tokens + self.config.plan.response_tokens

    @property
    def models(self) -> list[Model]:
        return [model for model in (self.model, self.critic, self.reference, self.reward_model) if model is not None]

    @property
    def learners(self) -> list[Model]:
        return [model for model in (self.model, self.critic) if model is not None]

    @property
    def samples(self) -> int:
        """Of one step."""
        plan = self.config.plan
        return plan.num_prompts * plan.samples_per_prompt if plan.algorithm in ONLINE else plan.global_batch_size

    @property
    def learned(self) -> int:
        """Tokens of a sample that the loss is about: the last one of a text that is scored."""
        return 1 if self.config.plan.algorithm == "reward" else self.config.plan.response_tokens

    @property
    def rows(self) -> int:
        """Texts of a sample: two where it is a pair."""
        return 2 if self.config.plan.algorithm == "reward" else 1

    def passage(self, micro_batch_size: int, recompute: str | None) -> Passage:
        """What a microbatch is, its rows padded as on GPUs."""
        rows = micro_batch_size * self.rows
        length = max(self.length, min(bucket_length(self.length), self.model.architecture.max_position_embeddings))
        return Passage(rows, length, rows * self.learned, recompute, self.config.plan.layer_spec)


@dataclass(frozen=True)
class Plan:
    """``slots`` is 0 where nothing is generated. ``reference``: "resident" | "offload" | "swap", as ``ppo.reference``
    and ``ppo.offload`` have it; ``offload``: "optimizer", "critic"; ``reward_model``: "resident" | "swap"."""

    cut: Cut
    micro_batch_size: int
    recompute: str | None
    slots: int = 0
    reference: str | None = None
    offload: tuple[str, ...] = ()
    reward_model: str | None = None


def make_work(
    config: PlanConfig, model: Architecture, critic: Architecture | None, reward_model: Architecture | None
) -> Work:
    """``critic`` and ``reward_model`` as the configuration names them, None where it does not.

    Raises:
        ValueError: sequences are longer than a model can read, or the critic reads other tokens.
    """
    plan = config.plan
    size = ITEMSIZE[plan.precision]
    length = plan.prompt_tokens + plan.response_tokens
    for what in filter(None, (model, critic, reward_model)):
        if length > what.max_position_embeddings:
            raise ValueError(
                f"plan.prompt_tokens={plan.prompt_tokens} and plan.response_tokens={plan.response_tokens} are more "
                f"than the {what.max_position_embeddings} tokens that a model was made for: lower one of them."
            )
    if critic is not None and critic.vocab_size != model.vocab_size:
        raise ValueError(
            f"plan.critic={plan.critic} has a vocabulary of {critic.vocab_size} and plan.model={plan.model} one of "
            f"{model.vocab_size}: both must read the same tokens."
        )
    if plan.algorithm == "ilql":
        width = HEAD_WIDTH * model.hidden_size
        model = replace(model, ilql_num_q=NUM_Q, ilql_head_width=width, ilql_value_trunk=plan.value_trunk)
        return Work(config, Model(model, "ilql", size))
    if plan.algorithm != "ppo":
        return Work(config, Model(model, "critic" if plan.algorithm == "reward" else "policy", size))
    return Work(
        config,
        Model(model, "policy", size),
        critic=Model(critic or model, "critic", size) if plan.advantage == "gae" else None,
        reference=Model(model, "policy", size),
        reward_model=Model(reward_model, "critic", size) if reward_model is not None else None,
    )
