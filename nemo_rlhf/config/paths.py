"""Keys that are paths, which mean the same wherever the working directory goes later."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_rlhf.config.rules import value_of

PATHS = (
    "exp_manager.explicit_log_dir",
    "model.restore_from",
    "model.tokenizer",
    "model.critic.restore_from",
    "data.chat_template",
    "ppo.feedback.guidelines",
    "server.url_file",
    "slurm.log_dir",
    "slurm.container.image",
    "out",
)
# These may be names of something else, too, and are paths where there is a file.
PERHAPS = (
    "data.train",
    "data.validation",
    "data.prompts",
    "data.validation_prompts",
    "plan.model",
    "plan.critic",
    "plan.reward_model",
)
STORE = "ppo.feedback.store"
_OF_SOURCES = ("restore_from", "url_file")


def locate(cfg: Any, *, absolute: bool) -> None:
    """Replace ``~`` in every path of ``cfg`` and, with ``absolute``, begin it at the working directory."""

    def place(path: str) -> str:
        return located(path) if absolute else os.path.expanduser(path)

    for key in (*PATHS, *PERHAPS):
        given = value_of(cfg, key)
        if isinstance(given, str) and given and not (key in PERHAPS and not os.path.exists(os.path.expanduser(given))):
            _set(cfg, key, place(given))
    store = value_of(cfg, STORE)
    if isinstance(store, str) and store:
        scheme, slashes, path = store.rpartition("sqlite:///")
        if "://" not in store or (slashes and not scheme and path and path != ":memory:"):
            _set(cfg, STORE, f"{slashes}{place(path)}")
    for entry in value_of(cfg, "reward.sources") or ():
        for name in _OF_SOURCES:
            if isinstance(entry.get(name), str) and entry[name]:
                entry[name] = place(entry[name])


def located(path: str | Path) -> str:
    """``path`` from the root, with ``~`` replaced; what a link in it points to is left to whoever opens it."""
    return os.path.abspath(os.path.expanduser(path))


def _set(cfg: Any, key: str, value: str) -> None:
    section, _, name = key.rpartition(".")
    setattr(value_of(cfg, section) if section else cfg, name, value)
