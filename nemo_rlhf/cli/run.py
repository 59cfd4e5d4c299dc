"""From a configuration to a finished run: reads the data, and makes the algorithm that ``fit`` runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
from nemo_rlhf.cli.run_directory import Code, Data
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
)
from nemo_rlhf.config.sources import read_sources
from nemo_rlhf.convert.locate import read_architecture
from nemo_rlhf.data.dialogues import read_dialogues, standardise
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.prompts import read_prompts, share_fields
from nemo_rlhf.data.records import Source
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
        online = _online(config, reward_fn, prompts, validation_prompts, metric_fn)
        inputs = PPOInputs(**online, store=store, stopping=stop.noted)
    else:
        begin(config.model, config.trainer, config.seed)
        tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)
        inputs = PPOInputs(tokenizer, tokenizer_dir, env=env, metric_fn=metric_fn)
    return fit(PPO(config, inputs), config, *_made_of(inputs))


def run_rft(
    config: RFTConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Source | None = None,
    validation_prompts: Source | None = None,
    metric_fn: Callable[..., dict[str, Any]] | None = None,
) -> int:
    """Run RFT; as ``run_ppo``."""
    inputs = RFTInputs(**_online(config, reward_fn, prompts, validation_prompts, metric_fn))
    return fit(RFT(config, inputs), config, *_made_of(inputs))


def _made_of(inputs: PPOInputs | RFTInputs) -> tuple[Data, Code]:
    sources = {f"reward function {source.name or ''}".rstrip(): source.reward_fn for source in inputs.sources}
    environment = {"environment": inputs.env} if isinstance(inputs, PPOInputs) else {}
    data = {"training": inputs.prompts, "validation": inputs.validation_prompts}
    return data, {**sources, **environment, "metric function": inputs.metric_fn}


def _online(
    config: PPOConfig | RFTConfig,
    reward_fn: RewardFunction | None,
    prompts: Source | None,
    validation_prompts: Source | None,
    metric_fn: Callable[..., dict[str, Any]] | None,
) -> dict[str, Any]:
    """The inputs of an algorithm that samples from prompts, once this process has become a rank of its job."""
    sources = _sources(config, reward_fn)
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)

    def read(source: Source | None) -> Any:
        return read_prompts(source, tokenizer, config.data.max_prompt_length) if source is not None else ()

    training, validation = share_fields(
        read(prompts if prompts is not None else config.data.prompts),
        read(validation_prompts if validation_prompts is not None else config.data.validation_prompts),
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
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)

    data = config.data

    def read(source: Source | None, top_percent: float = 100.0) -> Any:
        if source is None:
            return ()
        limit, train_on = data.max_sequence_length, data.train_on
        return read_texts(source, tokenizer, limit, train_on, top_percent=top_percent)  # type: ignore[arg-type]

    texts = read(train if train is not None else data.train, data.top_percent)
    validation_texts = read(validation if validation is not None else data.validation)
    algorithm = SFT(config, tokenizer, tokenizer_dir, texts, validation_texts)
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
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)
    data = config.data

    def read(source: Source | None, given: Sequence[Any] | None = None) -> Any:
        if source is None:
            return ()
        limit, too_long = data.max_sequence_length, data.too_long
        return read_dialogues(source, tokenizer, limit, rewards=given, too_long=too_long)  # type: ignore[arg-type]

    dialogues, held_out = read(train if train is not None else data.train, rewards), read(data.validation)
    if data.standardise_rewards:
        dialogues, held_out = standardise(dialogues, held_out)
    prompts = validation_prompts if validation_prompts is not None else data.validation_prompts
    inputs = ILQLInputs(
        tokenizer=tokenizer,
        tokenizer_dir=tokenizer_dir,
        dialogues=dialogues,
        validation_dialogues=held_out,
        validation_prompts=() if prompts is None else read_prompts(prompts, tokenizer, data.max_prompt_length),
        reward_fn=reward_fn,
        metric_fn=metric_fn,
        logit_mask=None if logit_mask is None else torch.as_tensor(logit_mask),
    )
    held_out = [*held_out, *inputs.validation_prompts]
    code = {"reward function": reward_fn, "metric function": metric_fn}
    return fit(ILQL(config, inputs), config, {"training": dialogues, "validation": held_out}, code)


def run_reward(config: RewardModelConfig) -> int:
    """Train a reward model; as ``run_ppo``."""
    begin(config.model, config.trainer, config.seed)
    tokenizer, tokenizer_dir = open_tokenizer(config.model, config.data)
    regression = config.reward_model.loss == "regression"
    kind, read = (ScoreTraining, read_scores) if regression else (PairTraining, read_pairs)
    limit, data = config.data.max_sequence_length, config.data
    examples: Any = read(str(data.train), tokenizer, limit)
    held_out: Any = read(data.validation, tokenizer, limit) if data.validation else ()
    algorithm = kind(config, tokenizer, tokenizer_dir, examples, held_out)
    return fit(algorithm, config, {"training": examples, "validation": held_out}, {})


def run_generate(config: GenerateConfig) -> int:
    """Write one response for each prompt to ``config.out``, as jsonl in the order of the prompts."""
    begin(config.model, config.trainer, 0)
    tokenizer, _ = open_tokenizer(ModelConfig(**vars(config.model)), config.data)
    prompts = read_prompts(str(config.data.prompts), tokenizer, config.data.max_prompt_length)
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
