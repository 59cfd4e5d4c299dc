"""A run's directory at a start: that it can be used and by nobody else, and that it is still the same run."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from nemo_rlhf.algorithms.base import stored_origin
from nemo_rlhf.cli.callbacks import stored_checkpoints
from nemo_rlhf.cli.run_lock import locked
from nemo_rlhf.config import dump
from nemo_rlhf.config.changes import DATA, MODELS, Change, changes, fixed_values, not_allowed
from nemo_rlhf.config.dumping import write_private
from nemo_rlhf.config.rules import has_key, value_of
from nemo_rlhf.config.schema import TrainingConfig
from nemo_rlhf.data.checksum import checksum
from nemo_rlhf.parallel import checkpoint
from nemo_rlhf.rollout.pool import Pool

CONFIG = "config.yaml"
_DESCRIBES = 1 << 20  # bytes; larger files hold vocabularies and indexes
_DIRECTORIES = ("checkpoints", "rollouts", "validation", "values", "logs", "tensorboard")
_FILES = ("metrics.jsonl", CONFIG, "report.html")
_REPLACED = (CONFIG, "report.html")  # by new files, so that their own permissions do not matter

Data = Mapping[str, Sequence[Any]]
Code = Mapping[str, Callable[..., Any] | None]


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Rank 0 makes the directory, and has it to itself. All ranks call it.

    Raises:
        OSError: on every rank, where it cannot be used, or another run goes on in it.
    """
    with ExitStack() as stack:

        def take() -> None:
            _check_array_job(run_dir)
            _make(run_dir)
            stack.enter_context(locked(run_dir))

        checkpoint.on_rank_zero(take)
        yield


def _check_array_job(run_dir: Path) -> None:
    """Tasks of an array job are runs of their own, whose directories must differ: each has the task's number in it."""
    task, count = os.environ.get("SLURM_ARRAY_TASK_ID", ""), os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")
    if count != "1" and task and not re.search(rf"(?<!\d)0*{re.escape(task)}(?!\d)", str(run_dir)):
        raise OSError(
            f"This is task {task} of an array job of {count}, and all of them would run in {run_dir}: put the task's "
            "number into it, as in 'exp_manager.explicit_log_dir=runs/${oc.env:SLURM_ARRAY_TASK_ID}'."
        )


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The run directory {run_dir} cannot be made ({error.strerror}): choose another "
            "exp_manager.explicit_log_dir, or make room for it."
        ) from None
    for name in (*_DIRECTORIES, *_FILES):
        path, is_directory = run_dir / name, name in _DIRECTORIES
        if not os.path.lexists(path):
            continue
        if path.is_dir() != is_directory:
            kind = "a directory" if is_directory else "a file"
            raise OSError(f"{path} is in the way: the run needs {kind} of that name; move it away.")
        if name not in _REPLACED and not os.access(path, os.W_OK | (os.X_OK if is_directory else 0)):
            raise OSError(f"{path} cannot be written: change its permissions, or choose another run directory.")
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise OSError(f"The run directory {run_dir} cannot be written: change its permissions, or choose another.")


def run_date(run_dir: Path) -> datetime.date:
    """The day of a run's first start, by its newest checkpoint; of a new run today, by rank 0's clock. All ranks call
    it, and get the same."""
    day = [datetime.date.today()]
    if dist.get_rank() == 0:
        for directory in stored_checkpoints(run_dir):  # the newest comes last
            with suppress(Exception):  # a damaged one is told where it is read
                day = [datetime.date.fromisoformat(stored_origin(directory)["date"])]
    dist.broadcast_object_list(day, src=0)
    return day[0]


def origin(config: TrainingConfig, data: Data, code: Code) -> dict[str, Any]:
    """What a run is made from: configuration, data, and people's code. All ranks call it.

    Raises:
        ValueError: on every rank, where ranks have read other data than rank 0; they are named.
    """
    sums = {name: checksum(records) for name, records in data.items() if len(records)}
    mine = (os.environ.get("SLURMD_NODENAME") or socket.gethostname(), sums)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    node, expected = ranks[0]
    others = [f"rank {rank} on {its_node}" for rank, (its_node, found) in enumerate(ranks) if found != expected]
    if others:
        named = ", ".join(others[:8]) + (", ..." if others[8:] else "")
        raise ValueError(
            f"{named} read other training or validation data than rank 0 on {node}: put the same files on every node, "
            "or on a file system that all of them see."
        )
    described = {name: _describe(function) for name, function in code.items() if function is not None}
    return {
        "config": yaml.safe_load(dump(config)),
        "fixed": fixed_values(config),
        "models": {key: _contents(value_of(config, key)) for key in MODELS if has_key(config, key)},
        "data": sums,
        "code": described,
    }


def _contents(directory: Any) -> str | None:
    """A checksum of a model's directory that takes no reading of its weights: names, sizes, and what describes it."""
    root = Path(str(directory))
    if directory is None or not root.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode(errors="surrogateescape"))
        if path.suffix in (".json", ".yaml") and path.stat().st_size < _DESCRIBES:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _describe(function: Callable[..., Any]) -> dict[str, str]:
    """Its name and, where it comes from a file, a checksum of that."""
    while isinstance(function, partial):
        function = function.func
    function = function.function if isinstance(function, Pool) else function
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        source = Path(inspect.getsourcefile(named) or "").read_bytes()
    except (OSError, TypeError):  # typed in, or no Python
        source = b""
    return {"name": f"{named.__module__}:{named.__qualname__}", "source": hashlib.sha256(source).hexdigest()[:16]}


def check_resumption(config: TrainingConfig, found: Mapping[str, Any], resume: Path) -> None:
    """Says on stderr what has changed since the checkpoint ``resume``. All ranks call it.

    Raises:
        ValueError: what has changed makes another run of it; every such key is named.
    """
    before = stored_origin(resume)
    lines = changes(before.get("config", {}), found["config"]) | changes(before.get("fixed", {}), found["fixed"])
    models = changes(before.get("models", {}), found["models"])
    refused = not_allowed([key for key in lines if key not in MODELS], config.exp_manager.allow_changes)
    refused += not_allowed(models, config.exp_manager.allow_changes)
    shown = [f"{key}: {_show(old)} -> {_show(new)}" for key, (old, new) in lines.items()]
    shown += [f"{key}: the directory holds another model than before" for key in models if key not in lines]
    for name, (old, new) in changes(before.get("data", {}), found["data"]).items():
        shown.append(f"the {name} data is other than before (checksum {old[:12]} -> {new[:12]})")
        if name == "training":
            refused += not_allowed([DATA], config.exp_manager.allow_changes)
    shown += _code_lines(before.get("code", {}), found["code"])
    if shown and dist.get_rank() == 0:
        words = "\n".join(f"nemo-rlhf:   {line}" for line in shown)
        print(f"nemo-rlhf: since {resume} there have changed:\n{words}", file=sys.stderr, flush=True)
    if refused:
        raise ValueError(
            f"{resume.parents[1]} holds another run: {_differences(refused, lines)}. Set it back, or choose another "
            f"exp_manager.explicit_log_dir; exp_manager.allow_changes=[{','.join(refused)}] goes on all the same."
        )


def _differences(refused: Sequence[str], lines: Mapping[str, Change]) -> str:
    def difference(key: str) -> str:
        if key in lines:
            return f"{key} was {_show(lines[key][0])} and is {_show(lines[key][1])}"
        return "its training data differs" if key == DATA else f"the model in {key} is another one"

    return ", ".join(map(difference, refused))


def _code_lines(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = []
    for what in now.keys() & before.keys():
        old, new = before[what], now[what]
        if old["name"] != new["name"]:
            lines.append(f"the {what}: {old['name']} -> {new['name']}")
        elif old["source"] != new["source"]:
            lines.append(f"the file of the {what} {new['name']} is another than before")
    return lines


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def write_config(run_dir: Path, text: str) -> None:
    """Rank 0 writes ``config.yaml``; what another start has written there becomes ``config_N.yaml``."""
    if dist.get_rank() != 0:
        return
    path = run_dir / CONFIG
    if path.exists() and path.read_text() != text:
        number = next(n for n in range(1, 10**9) if not (run_dir / f"config_{n}.yaml").exists())
        path.rename(run_dir / f"config_{number}.yaml")
    partial_file = path.with_suffix(".partial")
    write_private(partial_file, text)
    partial_file.replace(path)
