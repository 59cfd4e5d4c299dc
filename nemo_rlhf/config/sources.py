"""What ``reward.sources`` may hold: one dataclass a kind of source, and the rules that an entry must obey.

A list's entries have no keys of their own in the schema, so they are checked here, in the words in which every other
key is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rlhf.config.dumping import masked
from nemo_rlhf.config.keys import expected, nearest_key, schema_keys
from nemo_rlhf.config.rules import COUNT, FUNCTION_NAME, INFINITY, NOT_NEGATIVE, POSITIVE, Rule
from nemo_rlhf.config.schema import PPOConfig, RFTConfig


@dataclass
class SourceConfig:
    """What every kind of source has."""

    kind: str = MISSING  # "function" | "model" | "http"
    name: str = MISSING  # what its scores are logged as: reward/<name>
    weight: float = 1.0  # the reward is the sum of weight times score over all sources


@dataclass
class FunctionSourceConfig(SourceConfig):
    """A Python function of the user, or one of ``nemo_rlhf.rollout.rules``."""

    function: str = MISSING  # "package.module:name", as reward.function
    arguments: dict[str, Any] = field(default_factory=dict)  # keywords that are given to it at every call
    workers: int = 0  # processes of each replica that call it, for one sample at a time; 0: the run's own, for all
    timeout_s: float | None = None  # seconds that a worker may take for one sample; null: any time
    on_failure: Any = "error"  # a worker that fails, crashes or is late: "error", or the score that the sample gets


@dataclass
class ModelSourceConfig(SourceConfig):
    """A reward model in the same job, cut as the policy is."""

    restore_from: str = MISSING  # a checkpoint of `nemo-rlhf reward`, or a ...ForSequenceClassification directory
    residence: str = "resident"  # "resident" on the device | "swap"ped in from host memory where it is needed
    micro_batch_size: int | None = None  # samples in one forward pass; null: model.micro_batch_size
    normalise: bool = False  # scores minus the mean of those on held-out data, divided by their deviation


@dataclass
class HttpSourceConfig(SourceConfig):
    """A service that answers ``POST {"samples": [...]}`` with ``{"rewards": [...]}`` (docs/rewards.md)."""

    url: str | None = None  # the whole address, such as http://node7:8000/score
    url_file: str | None = None  # or a file that holds it, which is read before every attempt
    batch_size: int = 32  # samples in one request
    concurrency: int = 4  # requests at a time, of each data-parallel rank
    timeout_s: float = 60.0  # seconds that one request may take
    backoff_s: float = 0.5  # pause before a request is sent again, doubled each time up to 30 s
    wait_s: float = 600.0  # seconds without an answer after which the service counts as gone, and the run stops
    token_env: str | None = None  # environment variable with the token for "Authorization: Bearer"; null: none


KINDS: dict[str, type[SourceConfig]] = {
    "function": FunctionSourceConfig,
    "model": ModelSourceConfig,
    "http": HttpSourceConfig,
}

_RANGES: dict[str, Rule] = {
    "weight": ("a finite number", lambda x: abs(x) < INFINITY),
    "workers": NOT_NEGATIVE,
    "micro_batch_size": COUNT,
    "batch_size": COUNT,
    "concurrency": COUNT,
    "timeout_s": POSITIVE,
    "backoff_s": POSITIVE,
    "wait_s": NOT_NEGATIVE,
}


def read_sources(entries: Sequence[Mapping[str, Any]]) -> list[SourceConfig]:
    """The entries of ``reward.sources`` in their classes.

    Raises:
        ValueError: an entry has an unknown kind or key, lacks one, or breaks a rule; the sentence names it.
    """
    sources = [_read(f"reward.sources[{place}]", entry) for place, entry in enumerate(entries)]
    for place, source in enumerate(sources):
        where = f"reward.sources[{place}]"
        for key, (words, holds) in _RANGES.items():
            value = getattr(source, key, None)
            if value is not None and not holds(value):
                raise ValueError(f"{where}.{key}={value} is out of range: it must be {words}.")
        if not re.fullmatch(r"[\w.-]+", source.name) or source.name in ("mean", "std"):
            raise ValueError(
                f'{where}.name="{source.name}" cannot be logged as reward/<name>: use letters, digits, ".", "-" and '
                '"_", and neither "mean" nor "std".'
            )
        if source.name in [earlier.name for earlier in sources[:place]]:
            raise ValueError(f'{where}.name="{source.name}" is the name of an earlier source too: change one of them.')
        if isinstance(source, FunctionSourceConfig):
            _check_function(source, where)
        elif isinstance(source, HttpSourceConfig):
            _check_http(source, where)
        elif isinstance(source, ModelSourceConfig) and source.residence not in ("resident", "swap"):
            raise ValueError(f"{where}.residence={source.residence} is not known: choose one of resident, swap.")
    return sources


def check_reward(cfg: PPOConfig | RFTConfig) -> None:
    """The sources, and what they have to do with the rest of the configuration."""
    sources = read_sources(cfg.reward.sources)
    waits = sum(source.wait_s + source.timeout_s for source in sources if isinstance(source, HttpSourceConfig))
    if waits >= cfg.trainer.timeout_s:
        raise ValueError(
            f"trainer.timeout_s={cfg.trainer.timeout_s} would end the job while it waits for reward services, which "
            f"may take {waits:g} s (wait_s and timeout_s of reward.sources): raise it above that, or lower wait_s."
        )


def _read(where: str, entry: Mapping[str, Any]) -> SourceConfig:
    kind = entry.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{where}.kind={kind} is not known: choose one of {', '.join(KINDS)}.")
    schema = KINDS[kind]
    keys = schema_keys(schema)  # type: ignore[arg-type]
    node: DictConfig = OmegaConf.structured(schema)
    for key, value in entry.items():
        if key not in keys:
            raise ValueError(
                f"There is no configuration key {where}.{key} in a source of kind {kind}: did you mean "
                f"{nearest_key(str(key), keys)}?"
            )
        try:
            OmegaConf.update(node, str(key), value)
        except OmegaConfBaseException:
            raise ValueError(f"{where}.{key}={value} has the wrong type: it must be {expected(keys[key])}.") from None
    for key in keys:
        if OmegaConf.is_missing(node, key):
            raise ValueError(f"{where}.{key} is not set: a source of kind {kind} needs it.")
    source = OmegaConf.to_object(node)
    assert isinstance(source, SourceConfig)
    return source


def _check_function(source: FunctionSourceConfig, where: str) -> None:
    if not re.fullmatch(FUNCTION_NAME, source.function):
        raise ValueError(
            f"{where}.function={source.function} does not name a Python function: write package.module:name, such as "
            "my_package.rewards:score."
        )
    failure = source.on_failure
    is_number = isinstance(failure, int | float) and not isinstance(failure, bool) and abs(failure) < INFINITY
    if failure != "error" and not is_number:
        raise ValueError(f'{where}.on_failure={failure} is not valid: it must be "error" or a finite number.')
    if source.workers == 0 and (source.timeout_s is not None or failure != "error"):
        key = "timeout_s" if source.timeout_s is not None else "on_failure"
        raise ValueError(
            f"{where}.{key}={getattr(source, key)} needs processes that may be ended: set workers to 1 or more."
        )


def _check_http(source: HttpSourceConfig, where: str) -> None:
    if (source.url is None) == (source.url_file is None):
        raise ValueError(f"{where} needs either url or url_file, and not both.")
    if source.url is not None and not re.match(r"https?://[^/]", source.url):
        raise ValueError(f"{where}.url={masked(source.url)} is no address: write it whole, as http://host:8000/score.")
