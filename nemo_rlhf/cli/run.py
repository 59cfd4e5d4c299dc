"""From a configuration to a finished run: reads the data, and makes the algorithm that ``fit`` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_rlhf.algorithms.base import Algorithm
from nemo_rlhf.algorithms.evaluate import sample
from nemo_rlhf.algorithms.ilql import ILQL, ILQLInputs
from nemo_rlhf.algorithms.play import Environment, play
from nemo_rlhf.algorithms.ppo import PPO, PPOInputs
from nemo_rlhf.algorithms.reward import PairTraining, ScoreTraining
from nemo_rlhf.algorithms.rft import RFT, RFTInputs
from nemo_rlhf.algorithms.roles import open_role, open_tokenizer
from nemo_rlhf.algorithms.samples import METADATA, beside_ours
from nemo_rlhf.algorithms.sft import SFT
from nemo_rlhf.cli import stop
from nemo_rlhf.cli.fit import EXIT_DONE, fit
from nemo_rlhf.cli.people import open_store
from nemo_rlhf.cli.rank import begin, end
from nemo_rlhf.cli.run_directory import Code, Data, run_date
from nemo_rlhf.config.environment import check_given_environment
from nemo_rlhf.config.sampling import sampling_values
from nemo_rlhf.config.schema import (
    GenerateConfig,
    ILQLConfig,
    ModelConfig,
    PPOConfig,
    RewardModelConfig,
    RFTConfig,
    SFTConfig,
    TrainingConfig,
)
from nemo_rlhf.config.sources import read_sources
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.dialogues import read_dialogues, standardise
from nemo_rlhf.data.files import Source
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.prompts import read_prompts, share_fields
from nemo_rlhf.data.scores import read_scores
from nemo_rlhf.data.texts import read_texts
from nemo_rlhf.generation.engine import Engine
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.ilql import ILQLModel
from nemo_rlhf.models.policy import PolicyModel
from nemo_rlhf.rollout.collect import make_requests
from nemo_rlhf.rollout.named import load_function
from nemo_rlhf.rollout.score import RewardFunction
from nemo_rlhf.rollout.sources import CalledSource, open_sources
from nemo_rlhf.types import Episode


def run_ppo(
    config: PPOConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Source | None = None,
    validation_prompts: Source | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
    env: Callable[[int], Environment] | None = None,
) -> int:
    """Run PPO in this process, which is one rank of the job; returns the exit code.

    What is given as an argument takes the place of the configuration's file or function.

    Raises:
        ValueError: wrong input, the same on every rank.
    """
    if env is not None:
        check_given_environment(config)
    elif config.environment.function is not None:
        env = load_function(config.environment.function, "environment.function")
    if env is None:
        store = open_store(config)
        intake = _intake(config)
        online = _online(config, intake, reward_fn, prompts, validation_prompts, metric_fn)
        inputs = PPOInputs(**online, store=store, stopping=stop.noted)
    else:
        intake = Intake()
        begin(config.model, config.trainer, config.seed)
        tokenizer, tokenizer_dir = _tokenizer(config)
        inputs = PPOInputs(tokenizer, tokenizer_dir, env=env, metric_fn=metric_fn)
    return fit(_counted(PPO(config, inputs), intake), config, *_made_of(inputs))


def run_rft(
    config: RFTConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Source | None = None,
    validation_prompts: Source | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
) -> int:
    """Run RFT; as ``run_ppo``."""
    intake = _intake(config)
    inputs = RFTInputs(**_online(config, intake, reward_fn, prompts, validation_prompts, metric_fn))
    return fit(_counted(RFT(config, inputs), intake), config, *_made_of(inputs))


def _made_of(inputs: PPOInputs | RFTInputs) -> tuple[Data, Code]:
    sources = {f"reward function {source.name or ''}".rstrip(): source.reward_fn for source in inputs.sources}
    environment = {"environment": inputs.env} if isinstance(inputs, PPOInputs) else {}
    data = {"training": inputs.prompts, "validation": inputs.validation_prompts}
    return data, {**sources, **environment, "metric function": inputs.metric_fn}


def _tokenizer(config: TrainingConfig) -> tuple[Any, Path]:
    """The run's tokenizer and its directory; chats are dated as they were at the run's first start."""
    tokenizer, directory = open_tokenizer(config.model, config.data)
    tokenizer.chat_date = run_date(Path(str(config.exp_manager.explicit_log_dir)))
    return tokenizer, directory


def _intake(config: TrainingConfig | GenerateConfig) -> Intake:
    data = config.data
    return Intake(data.fields, data.on_error, data.empty_turns == "drop")  # type: ignore[arg-type]


def _counted(algorithm: Algorithm, intake: Intake) -> Algorithm:
    """The algorithm with what was left out of its data among its metrics."""
    if intake.on_error == "skip":
        algorithm.constants["data/skipped"] = float(len(intake.refused))
    if intake.drops_empty_turns:
        algorithm.constants["data/empty_turns"] = float(intake.num_empty_turns)
    return algorithm


def _read(reader: Callable[..., Any], given: Source | None, configured: str | None, *how: Any, **more: Any) -> Any:
    """What ``reader`` makes of the records given in Python, or else of those that the configuration names."""
    source = configured if given is None else given
    return () if source is None else reader(source, *how, **more)


def _online(
    config: PPOConfig | RFTConfig,
    intake: Intake,
    reward_fn: RewardFunction | None,
    prompts: Source | None,
    validation_prompts: Source | None,
    metric_fn: Callable[..., dict[str, Any]] | None,
) -> dict[str, Any]:
    """The inputs of an algorithm that samples from prompts, once this process has become a rank of its job."""
    sources = _sources(config, reward_fn)
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = _tokenizer(config)

    how = (tokenizer, config.data.max_prompt_length)
    training, validation = share_fields(
        _read(read_prompts, prompts, config.data.prompts, *how, intake=intake),
        _read(read_prompts, validation_prompts, config.data.validation_prompts, *how, intake=intake),
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_dir": tokenizer_dir,
        "prompts": training,
        "validation_prompts": validation,
        "sources": sources,
        "metric_fn": metric_fn,
    }


def _sources(config: PPOConfig | RFTConfig, reward_fn: RewardFunction | None) -> list[CalledSource]:
    if not config.reward.sources:
        return [CalledSource(reward_fn or load_function(str(config.reward.function)))]
    if reward_fn is not None:
        raise ValueError("reward.sources is set in the configuration and reward_fn given in Python: keep one of them.")
    return open_sources(read_sources(config.reward.sources), stop.noted, config.trainer.timeout_s)


def run_sft(config: SFTConfig, *, train: Source | None = None, validation: Source | None = None) -> int:
    """Run supervised fine-tuning; as ``run_ppo``."""
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = _tokenizer(config)

    data, intake = config.data, _intake(config)
    how = (tokenizer, data.max_sequence_length, data.train_on)
    texts = _read(read_texts, train, data.train, *how, top_percent=data.top_percent, intake=intake)
    validation_texts = _read(read_texts, validation, data.validation, *how, intake=intake)
    algorithm = _counted(SFT(config, tokenizer, tokenizer_dir, texts, validation_texts), intake)
    return fit(algorithm, config, {"training": texts, "validation": validation_texts}, {})


def run_ilql(
    config: ILQLConfig,
    *,
    train: Source | None = None,
    rewards: Sequence[Any] | None = None,
    validation_prompts: Source | None = None,
    reward_fn: RewardFunction | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
    logit_mask: Any = None,
) -> int:
    """Run ILQL; as ``run_ppo``. ``rewards`` are those of ``train``."""
    if reward_fn is None and config.reward.function is not None:
        reward_fn = load_function(config.reward.function)
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = _tokenizer(config)
    data, intake = config.data, _intake(config)
    how: dict[str, Any] = {"too_long": data.too_long, "intake": intake}
    limit = data.max_sequence_length
    dialogues = _read(read_dialogues, train, data.train, tokenizer, limit, rewards=rewards, **how)
    held_out = _read(read_dialogues, None, data.validation, tokenizer, limit, **how)
    if data.standardise_rewards:
        dialogues, held_out = standardise(dialogues, held_out)
    limit = data.max_prompt_length
    prompts = _read(read_prompts, validation_prompts, data.validation_prompts, tokenizer, limit, intake=intake)
    inputs = ILQLInputs(
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        dialogues=dialogues,
        validation_dialogues=held_out,
        validation_prompts=prompts,
        reward_fn=reward_fn,
        metric_fn=metric_fn,
        logit_mask=None if logit_mask is None else torch.as_tensor(logit_mask),
    )
    held_out = [*held_out, *inputs.validation_prompts]
    code = {"reward function": reward_fn, "metric function": metric_fn}
    algorithm = _counted(ILQL(config, inputs), intake)
    return fit(algorithm, config, {"training": dialogues, "validation": held_out}, code)


def run_reward(config: RewardModelConfig) -> int:
    """Train a reward model; as ``run_ppo``."""
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = _tokenizer(config)
    regression = config.reward_model.loss == "regression"
    kind, read = (ScoreTraining, read_scores) if regression else (PairTraining, read_pairs)
    limit, data, intake = config.data.max_sequence_length, config.data, _intake(config)
    examples = _read(read, None, data.train, tokenizer, limit, intake=intake)
    held_out = _read(read, None, data.validation, tokenizer, limit, intake=intake)
    algorithm = _counted(kind(config, tokenizer, tokenizer_dir, examples, held_out), intake)
    return fit(algorithm, config, {"training": examples, "validation": held_out}, {})


def run_generate(config: GenerateConfig) -> int:
    """Write one response for each prompt to ``config.out``, as jsonl in the order of the prompts."""
    begin(config.model, config.trainer, 0)
    tokenizer, _ = open_tokenizer(ModelConfig(**vars(config.model)), config.data)
    limit = config.data.max_prompt_length
    prompts = read_prompts(str(config.data.prompts), tokenizer, limit, intake=_intake(config))
    model = _open_sampler(config)
    longest = model.architecture.max_position_embeddings
    engine = Engine(model.gpt, tokenizer, num_slots=config.generation.num_slots, max_sequence_length=longest)
    samples = sample(engine, make_requests(prompts, 1, 0), SamplingParams(**sampling_values(config.generation)))
    if dist.get_rank() == 0:
        out = Path(str(config.out))
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        with partial.open("w") as file:
            for one in samples:
                ours = {"prompt": one.prompt.text, "response": one.text, "finish_reason": one.finish_reason}
                fields = beside_ours(one.prompt.metadata, (*ours, METADATA))
                file.write(json.dumps({**fields, **ours}, default=str) + "\n")
        partial.replace(out)
    return end(EXIT_DONE)


def run_play(
    config: GenerateConfig,
    env: Callable[[int], Environment],
    num_episodes: int,
    *,
    max_turns: int | None,
    max_sequence_length: int,
    logit_mask: Any,
) -> list[Episode]:
    """As ``nemo_rlhf.play``, in this process, which is one rank of the job."""
    begin(config.model, config.trainer, 0)
    tokenizer, _ = open_tokenizer(ModelConfig(**vars(config.model)))
    model = _open_sampler(config)
    longest = min(max_sequence_length, model.architecture.max_position_embeddings)
    engine = Engine(
        model.gpt,
        tokenizer,
        num_slots=config.generation.num_slots,
        max_sequence_length=longest,
        logit_mask=None if logit_mask is None else torch.as_tensor(logit_mask),
    )
    sampling = SamplingParams(**sampling_values(config.generation))
    episodes = play(engine, tokenizer, env, num_episodes, sampling, max_sequence_length=longest, max_turns=max_turns)
    end(EXIT_DONE)
    return episodes


def _open_sampler(config: GenerateConfig) -> PolicyModel | ILQLModel:
    source = config.model.restore_from
    kind: type[PolicyModel] | type[ILQLModel] = PolicyModel
    if "ilql" in read_architecture(source).heads:
        kind = ILQLModel
    return open_role(kind, ModelConfig(**vars(config.model)), source, config.trainer.precision, 0)
