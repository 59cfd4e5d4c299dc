"""What may differ between the starts of one run, and what would make another run of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nemo_rlhf.config.keys import schema_keys
from nemo_rlhf.config.rules import has_key, value_of

# What a run learns from, and the shape of what learns: keys that cannot be meant to change in its midst. All others
# may, and are told: how long it runs, how it is cut, what it costs, how fast it learns, where files are. What the files
# of ``data`` hold is compared itself, under the name DATA, wherever they are.
FIXED = (
    "seed",
    "data.shuffle",
    "model.init",
    "model.global_batch_size",
    "ppo.num_prompts",
    "ppo.samples_per_prompt",
    "ppo.minibatch_size",
    "ppo.advantage",
    "rft.num_prompts",
    "rft.samples_per_prompt",
    "ilql.target",
    "ilql.two_qs",
    "ilql.head_width",
    "ilql.value_trunk",
    "ilql.num_layers_unfrozen",
    "reward_model.loss",
    "environment.validation_episodes",
    "generation.seed",
)
DATA = "data"
# Directories that are compared by what they hold: a model may be staged at another place by every job.
MODELS = ("model.restore_from", "model.tokenizer", "model.critic.restore_from")
_ALLOW = "exp_manager.allow_changes"

Change = tuple[Any, Any]  # what it was, what it is


def fixed_values(cfg: Any) -> dict[str, Any]:
    """The values of FIXED that this command has, as they are: a dump may keep names of variables in their place."""
    return {key: value_of(cfg, key) for key in FIXED if has_key(cfg, key)}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Change]:
    """Keys that both have and whose values differ, but that which allows it."""
    found: dict[str, Change] = {}
    for key, value in now.items():
        if key not in before:
            continue
        if isinstance(value, Mapping) and isinstance(before[key], Mapping):
            found |= {f"{key}.{inner}": change for inner, change in changes(before[key], value).items()}
        elif value != before[key]:
            found[key] = (before[key], value)
    found.pop(_ALLOW, None)
    return found


def not_allowed(found: Collection[str], allowed: Any) -> list[str]:
    """Those of the changed keys that are refused under ``exp_manager.allow_changes=allowed``."""
    if allowed is True:
        return []
    sections = allowed or []
    return [
        key
        for key in found
        if key in (*FIXED, *MODELS, DATA) and not any(_is_below(key, section) for section in sections)
    ]


def _is_below(key: str, section: str) -> bool:
    return key == section or key.startswith(f"{section}.")


def check_allow_changes(cfg: Any) -> None:
    """Raises ValueError where the key is neither true, false nor a list of keys and sections."""
    allowed = cfg.exp_manager.allow_changes
    if isinstance(allowed, bool):
        return
    schema: type = type(cfg)
    keys = schema_keys(schema)
    if not isinstance(allowed, list):
        raise ValueError(
            f"{_ALLOW}={allowed} must be true, false, or a list of the keys that may differ, as [seed,data]."
        )
    for name in allowed:
        if not isinstance(name, str) or not any(_is_below(key, name) for key in keys):
            raise ValueError(
                f"{_ALLOW} names {name}, which is no configuration key: name keys or sections, as [seed,data]."
            )
