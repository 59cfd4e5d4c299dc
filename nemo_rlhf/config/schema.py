"""Every configuration key there is, with its type, its default and one line on what it does.

The dataclasses are the whole truth: files in ``conf/`` and overrides on the command line may only set keys that are
here, and the rest of the package reads instances of them. ``REQUIRED`` keys have no default. Words are those of NeMo
and Lightning where they have one. No torch is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from nemo_rlhf.config.environment import EnvironmentConfig
from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.config.people import FeedbackConfig
from nemo_rlhf.config.server import ServerConfig


@dataclass
class HardwareConfig:
    """Which processes take part."""

    devices: int = 1  # processes (one GPU each) per node
    num_nodes: int = 1  # nodes of the job
    precision: str = "32"  # of weights and activations: "32" | "bf16"
    matmul_precision: str = "highest"  # of products in fp32: "highest" | "high", with TF32 where a GPU has it
    timeout_s: int = 1800  # seconds that a collective may wait for another rank before the job ends
    heartbeat_timeout_s: int = 120  # seconds without a sign of life from a rank before the job ends


@dataclass
class TrainerConfig(HardwareConfig):
    max_steps: int = 100  # steps of the whole run; in PPO one step is one iteration of rollout and update
    val_check_interval: int = 0  # validate every this many steps; 0: never
    log_every_n_steps: int = 1  # write metrics every this many steps
    enable_progress_bar: bool = True  # draw progress on the terminal of rank 0


@dataclass
class OfflineTrainerConfig(TrainerConfig):
    max_epochs: int | None = None  # passes over the data, in place of max_steps; null: max_steps counts


@dataclass
class CheckpointConfig:
    every_n_train_steps: int = 50  # save every this many steps, and always after the last one
    save_last_k: int = 2  # keep this many of the latest checkpoints
    save_top_k: int = 1  # keep this many of the best by `monitor`, too; 0: none
    monitor: str = "val/reward"  # the validation metric that decides which is best
    mode: str = "max"  # whether more or less of it is better: "max" | "min"
    async_save: bool = False  # write checkpoints while training goes on


@dataclass
class ExpManagerConfig:
    explicit_log_dir: str = MISSING  # the run directory: checkpoints, metrics, samples, logs
    resume_if_exists: bool = True  # continue from the newest whole checkpoint in the run directory
    allow_changes: Any = False  # to go on with other data, seeds, batches, ...: true, or the keys that may differ
    create_tensorboard_logger: bool = True  # write TensorBoard events below the run directory
    create_wandb_logger: bool = False  # log to Weights & Biases
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)  # project, name, ... of the W&B run
    checkpoint_callback_params: CheckpointConfig = field(default_factory=CheckpointConfig)


@dataclass
class BaseModelConfig:
    """Which weights, and how they are spread over ranks."""

    restore_from: str = MISSING  # a Megatron checkpoint or a Hugging Face directory
    init: str = "pretrained"  # "pretrained": its weights; "random": only its architecture and tokenizer
    tokenizer: str | None = None  # directory of another tokenizer; null: that of restore_from
    tensor_model_parallel_size: int = 1  # ranks that share each layer
    pipeline_model_parallel_size: int = 1  # ranks that share the stack of layers
    expert_model_parallel_size: int = 1  # tensor- and data-parallel ranks that share each layer's experts
    layer_spec: str = "auto"  # whose modules: "transformer_engine" | "local"; "auto": the former on GPUs that have it


@dataclass
class ModelConfig(BaseModelConfig):
    sequence_parallel: bool = False  # split norms and residuals along the sequence over the tensor-parallel ranks
    micro_batch_size: int = 1  # samples in one forward and backward pass of one data-parallel rank
    global_batch_size: int = 128  # samples of one optimizer step over all data-parallel ranks
    activations_checkpoint_granularity: str | None = None  # recompute: null nothing | "selective" feed-forward | "full"
    overlap_param_gather: bool = False  # gather updated weights while the next forward pass of the same update goes on
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass
class ServedModelConfig(BaseModelConfig):
    micro_batch_size: int = 8  # samples in one forward pass of one data-parallel rank


@dataclass
class CriticConfig:
    restore_from: str | None = None  # a Megatron checkpoint or Hugging Face directory; null: the policy's start
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=5e-6))


@dataclass
class PPOModelConfig(ModelConfig):
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass
class KLConfig:
    """The penalty for leaving the reference policy."""

    estimator: str = "k1"  # per token, from lp - lp_ref: "k1" | "k2" | "k3" (Schulman 2020) | "abs"
    coef: float = 0.02  # (initial) coefficient beta of the penalty
    target: float | None = None  # KL per sequence that an adaptive beta steers for; null: beta is fixed
    horizon: int = 10000  # samples over which the adaptive beta reacts


@dataclass
class PPOAlgorithmConfig:
    num_prompts: int = 64  # prompts per step, over all data-parallel ranks
    samples_per_prompt: int = 2  # responses to each prompt
    epochs: int = 1  # passes over each step's samples
    minibatch_size: int = II("model.global_batch_size")  # samples per optimizer step, over all data-parallel ranks
    advantage: str = "gae"  # "gae" with a critic | "rloo" | "grpo": against a prompt's other samples, without one
    scale_by_std: bool = True  # grpo: divide by the deviation of a prompt's scores
    gamma: float = 1.0  # gae: discount per token
    lam: float = 0.95  # gae: lambda of generalised advantage estimation
    clip_low: float = 0.2  # the ratio is clipped below at 1 - clip_low
    clip_high: float = 0.2  # and above at 1 + clip_high
    dual_clip: float | None = None  # bound on the ratio where the advantage is negative (> 1); null: none
    value_clip: float = 0.2  # how far a value may move from that of the rollout
    entropy_coef: float = 0.0  # weight of the entropy bonus
    kl: KLConfig = field(default_factory=KLConfig)
    reward_clip: float | None = 10.0  # scores are clipped to +- this; null: not at all
    reward_scaling: str = "none"  # "none" | "running" moments | "reference" moments of the first rollouts
    on_truncation: str = "keep"  # responses cut at max_new_tokens: "keep" | "mask" teach nothing | "penalise"
    truncation_penalty: float = 1.0  # penalise: subtracted from their scores
    whiten_advantages: bool | None = None  # to mean 0 and deviation 1 over the rollout batch; null: with gae only
    target_kl: float | None = (
        None  # stop a step's epochs when the policy moved this far from the rollout's; null: never
    )
    critic_warmup_steps: int = 0  # first steps in which only the critic learns
    reference: str = "resident"  # the frozen policy: "resident" on the device | "swap"ped in from host memory
    offload: list[str] = field(default_factory=list)  # kept in host memory while idle: optimizer, critic, reference
    keep_graph: bool = False  # the first minibatch learns from the forward pass of the evaluation
    show_samples_every: int = 10  # show a few samples on the terminal every this many steps; 0: never
    keep_rollouts: int | None = None  # keep the samples of this many of the last steps in rollouts/; null: of all
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)


@dataclass
class ValidationSamplingConfig:
    """Sampling in validation. null: as in ``generation``; a list: one validation for each of its values."""

    max_new_tokens: Any = None
    temperature: Any = 0.0  # greedy; a list in generation.temperature takes this key's place
    top_k: Any = None
    top_p: Any = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    seed: Any = None
    beta: Any = None


@dataclass
class SamplingConfig:
    """One of max_new_tokens, temperature, top_k, top_p, seed, beta may be a list: rollouts use its first value, and
    validation runs once for each (``val/reward@temperature=0.7``)."""

    max_new_tokens: Any = 256  # int; longest response
    temperature: Any = 1.0  # float; 0: greedy (not in PPO rollouts)
    top_k: Any = 0  # int; sample from the k likeliest tokens; 0: from all
    top_p: Any = 1.0  # float; sample from the likeliest tokens that hold this probability
    stop: list[str] = field(default_factory=list)  # strings that end a response; special tokens by their names
    stop_token_ids: list[int] = field(default_factory=list)  # tokens that do, beside those of the model
    ignore_eos: bool = False  # go on whatever the model draws
    num_slots: int = 32  # sequences that one data-parallel rank generates at a time
    seed: Any = 0  # int; of the sampling noise
    beta: Any = 0.0  # float; how far the Q values of an ILQL model guide its policy; 0: not at all
    adv_clip: float | None = None  # an advantage Q - V counts at most +- this; null: without limit


@dataclass
class GenerationConfig(SamplingConfig):
    validation: ValidationSamplingConfig = field(default_factory=ValidationSamplingConfig)


@dataclass
class DataConfig:
    """What every command that reads data knows."""

    fields: dict[str, str] = field(default_factory=dict)  # {prompt: question}: what the files call a field of ours
    on_error: str = "stop"  # records that cannot be used: "stop" names them all | "skip" leaves them out, counted
    empty_turns: str = "refuse"  # of chats: "refuse" the record | "drop" the turns, counted
    chat_template: str | None = None  # a file with a Jinja template, in place of the tokenizer's; kept in checkpoints
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the template, of every chat


@dataclass
class PPODataConfig(DataConfig):
    prompts: str | None = None  # file of prompts (docs/data.md)
    validation_prompts: str | None = None  # the same; null: no validation
    max_prompt_length: int = 1024  # tokens; a longer prompt is an error
    shuffle: bool = True  # a new order every epoch, from `seed`


@dataclass
class SFTDataConfig(DataConfig):
    train: str | None = MISSING  # file of records (docs/data.md)
    validation: str | None = None  # the same; null: no validation
    max_sequence_length: int = 2048  # tokens of prompt and response
    train_on: str = "response"  # tokens that are learned: "response" | "all"
    top_percent: float = 100.0  # learn only this best share of scored records, by their rewards
    packing: bool = False  # texts share rows of max_sequence_length instead of being padded
    shuffle: bool = True  # a new order every epoch, from `seed`


@dataclass
class ILQLAlgorithmConfig:
    tau: float = 0.7  # expectile of V: 0.5 is the mean, towards 1 the best action
    gamma: float = 0.99  # discount per action
    beta: float = 0.0  # the policy's loss weighs an action by exp(beta * advantage); 0: plain cross-entropy
    alpha: float = 0.001  # how far target Q heads move towards Q at a sync
    cql_scale: float = 0.1  # weight of the conservative loss, which keeps Q near the data's actions
    awac_scale: float = 1.0  # weight of the policy's loss
    steps_for_target_q_sync: int = 5  # optimizer steps between syncs
    two_qs: bool = True  # two Q heads, of which the lower one counts
    target: str = "td"  # what Q learns: "td" reward and V of the next state | "mc" Monte-Carlo return
    head_width: int | None = None  # hidden layer of the heads; null: twice the model's
    value_trunk: bool = False  # V and Q heads stand on a trunk of their own, which starts as a copy of the policy's
    detach_heads: bool = False  # heads learn from the trunk, and teach it nothing
    num_layers_unfrozen: int = -1  # the last layers that learn; -1: all, 0: heads only


@dataclass
class RFTAlgorithmConfig:
    num_prompts: int = 64  # prompts per round, over all data-parallel ranks
    samples_per_prompt: int = 32  # responses to each prompt
    improve_steps: int = 4  # passes over a round's best responses, of which each pass takes fewer
    start_percentile: float = 0.7  # of a prompt's rewards: what the first pass learns from lies at or above it
    end_percentile: float = 0.95  # the same of the last pass; evenly between them
    keep_rollouts: int | None = None  # as in PPO


@dataclass
class ILQLDataConfig(DataConfig):
    train: str | None = MISSING  # file of records (docs/data.md): scored dialogues
    validation: str | None = None  # the same, for the validation loss; null: none
    validation_prompts: str | None = None  # prompts to sample from in validation; null: none
    max_sequence_length: int = 2048  # tokens of a dialogue
    max_prompt_length: int = 1024  # tokens; a longer prompt is an error
    too_long: str = "truncate"  # a longer dialogue: "truncate" loses its first turns | "refuse" is an error
    standardise_rewards: bool = True  # to deviation 1, and mean 0 where they fall at the end only
    shuffle: bool = True  # a new order every epoch, from `seed`


@dataclass
class RewardModelAlgorithmConfig:
    loss: str = "bradley_terry"  # "bradley_terry" on compared responses | "regression" on scored ones


@dataclass
class RewardDataConfig(DataConfig):
    train: str | None = MISSING  # file of records (docs/data.md): compared or scored responses
    validation: str | None = None  # the same; null: no validation
    max_sequence_length: int = 2048  # tokens of prompt and response; longer examples are left out
    shuffle: bool = True  # a new order every epoch, from `seed`


@dataclass
class GenerateDataConfig(DataConfig):
    prompts: str | None = MISSING  # file of prompts (docs/data.md)
    max_prompt_length: int = 1024  # tokens; a longer prompt is an error


@dataclass
class RewardConfig:
    """One of the two must be given."""

    function: str | None = None  # "package.module:name" of (samples, prompts, outputs, tokenizer, **metadata)
    sources: list[dict[str, Any]] = field(default_factory=list)  # functions, reward models, services (docs/rewards.md)


@dataclass
class SampleRewardConfig:
    function: str | None = None  # as in PPO; scores the samples of validation


@dataclass
class PPOConfig:
    """Configuration of ``nemo-rlhf ppo``."""

    seed: int = 1234  # of initialisation and data order
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: PPOModelConfig = field(default_factory=PPOModelConfig)
    ppo: PPOAlgorithmConfig = field(default_factory=PPOAlgorithmConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    data: PPODataConfig = field(default_factory=PPODataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


def _loss_exp_manager() -> ExpManagerConfig:
    return ExpManagerConfig(checkpoint_callback_params=CheckpointConfig(monitor="val/loss", mode="min"))


@dataclass
class SFTConfig:
    """Configuration of ``nemo-rlhf sft``."""

    seed: int = 1234  # of initialisation and data order
    trainer: OfflineTrainerConfig = field(default_factory=OfflineTrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=_loss_exp_manager)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(optim=OptimConfig(lr=1e-5)))
    data: SFTDataConfig = field(default_factory=SFTDataConfig)


@dataclass
class ILQLConfig:
    """Configuration of ``nemo-rlhf ilql``."""

    seed: int = 1234  # of initialisation and data order
    trainer: OfflineTrainerConfig = field(default_factory=OfflineTrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=_loss_exp_manager)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(optim=OptimConfig(lr=1e-5)))
    ilql: ILQLAlgorithmConfig = field(default_factory=ILQLAlgorithmConfig)
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(beta=1.0))
    data: ILQLDataConfig = field(default_factory=ILQLDataConfig)
    reward: SampleRewardConfig = field(default_factory=SampleRewardConfig)


@dataclass
class RFTConfig:
    """Configuration of ``nemo-rlhf rft``."""

    seed: int = 1234  # of initialisation and data order
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(optim=OptimConfig(lr=1e-5)))
    rft: RFTAlgorithmConfig = field(default_factory=RFTAlgorithmConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    data: PPODataConfig = field(default_factory=PPODataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass
class RewardModelConfig:
    """Configuration of ``nemo-rlhf reward``."""

    seed: int = 1234  # of initialisation and data order
    trainer: OfflineTrainerConfig = field(default_factory=OfflineTrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=_loss_exp_manager)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(optim=OptimConfig(lr=1e-5)))
    reward_model: RewardModelAlgorithmConfig = field(default_factory=RewardModelAlgorithmConfig)
    data: RewardDataConfig = field(default_factory=RewardDataConfig)


@dataclass
class GenerateConfig:
    """Configuration of ``nemo-rlhf generate``."""

    trainer: HardwareConfig = field(default_factory=HardwareConfig)
    model: BaseModelConfig = field(default_factory=BaseModelConfig)
    generation: SamplingConfig = field(default_factory=SamplingConfig)
    data: GenerateDataConfig = field(default_factory=GenerateDataConfig)
    out: str | None = MISSING  # the jsonl file that is written


@dataclass
class ServeRewardConfig:
    """Configuration of ``nemo-rlhf serve-reward``."""

    trainer: HardwareConfig = field(default_factory=HardwareConfig)
    model: ServedModelConfig = field(default_factory=ServedModelConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


TrainingConfig = PPOConfig | SFTConfig | ILQLConfig | RFTConfig | RewardModelConfig
Config = TrainingConfig | GenerateConfig | ServeRewardConfig
