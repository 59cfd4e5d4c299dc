"""From yaml files and overrides to one checked configuration object.

Hydra composes the yaml files; what comes out is laid over the schema key by key, so that a wrong key or type is told
in one sentence that names it. Layers, the later one wins: the schema's defaults, ``conf/<command>.yaml``, the user's
own file, overrides.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_origin, overload

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rlhf.config.commands import COMMANDS
from nemo_rlhf.config.data import DataCommandConfig
from nemo_rlhf.config.keys import expected, nearest_key, schema_keys
from nemo_rlhf.config.plan import PlanConfig
from nemo_rlhf.config.schema import (
    Config,
    GenerateConfig,
    ILQLConfig,
    PPOConfig,
    RewardModelConfig,
    RFTConfig,
    ServeRewardConfig,
    SFTConfig,
)
from nemo_rlhf.config.slurm import SlurmConfig
from nemo_rlhf.config.validate import require_keys, validate

ConfigFile = str | Path | None
Supplied = Collection[str]

COMMAND_LINE = "from the command line"
GROUPS = ("model",)  # directories of yaml files, of which one lays its values over the section of that name


@overload
def load(
    command: Literal["ppo"], overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> PPOConfig: ...
@overload
def load(
    command: Literal["sft"], overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> SFTConfig: ...
@overload
def load(
    command: Literal["ilql"], overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> ILQLConfig: ...
@overload
def load(
    command: Literal["rft"], overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> RFTConfig: ...
@overload
def load(
    command: Literal["reward"],
    overrides: Sequence[str] = (),
    *,
    config_file: ConfigFile = None,
    supplied: Supplied = (),
) -> RewardModelConfig: ...
@overload
def load(
    command: Literal["generate"],
    overrides: Sequence[str] = (),
    *,
    config_file: ConfigFile = None,
    supplied: Supplied = (),
) -> GenerateConfig: ...
@overload
def load(
    command: Literal["serve-reward"],
    overrides: Sequence[str] = (),
    *,
    config_file: ConfigFile = None,
    supplied: Supplied = (),
) -> ServeRewardConfig: ...
@overload
def load(
    command: Literal["data"], overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> DataCommandConfig: ...
@overload
def load(
    command: Literal["plan"], overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> PlanConfig: ...
@overload
def load(
    command: Literal["slurm"], overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> SlurmConfig: ...
@overload
def load(
    command: str, overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> Config | DataCommandConfig | PlanConfig | SlurmConfig: ...
def load(
    command: str, overrides: Sequence[str] = (), *, config_file: ConfigFile = None, supplied: Supplied = ()
) -> Config | DataCommandConfig | PlanConfig | SlurmConfig:
    """The configuration of ``command`` ("ppo", "sft", "ilql", "rft", "reward", "generate", "serve-reward", "data",
    "plan" or "slurm"), in its class.

    ``overrides`` are Hydra's ``key=value``, and ``model=llama3-70b`` takes a file of the group ``conf/model``;
    ``config_file`` is a yaml file of the user, or the name of a shipped one (``examples/llama3_8b_ppo``); ``supplied``
    names required keys that the caller has in memory ("data.prompts", "reward.function"), which stay None. Raises
    ValueError with one sentence for whatever is wrong.
    """
    if command not in COMMANDS:
        raise ValueError(f"There is no configuration for {command!r}: choose one of {', '.join(COMMANDS)}.")
    keys = schema_keys(COMMANDS[command])  # type: ignore[arg-type]
    chosen, overrides = _choices(overrides, keys)
    forced = _check_overrides(overrides, keys)
    base = config_directory() / f"{command}.yaml"
    node = OmegaConf.structured(COMMANDS[command])
    path = base
    if config_file is not None:
        path = find_config_file(config_file)
        _lay_over(node, _compose(base, [], {}), keys, base, ())
    _lay_over(node, _compose(path, forced, chosen), keys, path, overrides)
    _resolve(node, keys)
    require_keys(node, command, supplied)
    for key in supplied:
        OmegaConf.update(node, key, None)
    cfg = OmegaConf.to_object(node)
    assert isinstance(cfg, COMMANDS[command])
    validate(cfg)
    return cfg


def dump(cfg: Config) -> str:
    """``cfg`` as the yaml text of a file that ``--config`` reads back."""
    return yaml.safe_dump(asdict(cfg), sort_keys=False, allow_unicode=True)


def quoted(value: str) -> str:
    """Any text as a value of Hydra's override grammar: ``f"model.restore_from={quoted(path)}"``."""
    # There a backslash is itself, unless it stands before a quote or at the end.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", r"\'")
    return f"'{escaped}'"


def config_directory() -> Path:
    """Where the shipped yaml files are: inside the package in a wheel, at the top of the repository in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "conf", package.parent / "conf"):
        if (directory / "ppo.yaml").is_file():
            return directory
    raise ValueError(f"The shipped configuration is missing below {package}: install nemo-rlhf again.")


def find_config_file(name: str | Path) -> Path:
    """The yaml file ``name``: a path, or a file below ``config_directory()`` named with or without its ending."""
    shipped = config_directory()
    for path in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            if path.suffix != ".yaml":
                raise ValueError(f"{path} cannot be used as a configuration: its name must end in .yaml.")
            return path.resolve()
    files = sorted(path.relative_to(shipped) for path in shipped.rglob("*.yaml"))
    names = [path.with_suffix("").as_posix() for path in files if path.parent.name not in GROUPS]
    raise ValueError(f"There is no configuration file {name}: give a path, or a shipped one of {', '.join(names)}.")


def _unknown(key: str, keys: Collection[str], source: str) -> ValueError:
    return ValueError(f"There is no configuration key {key} ({source}): did you mean {nearest_key(key, keys)}?")


def _check_overrides(overrides: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """The overrides with ``++`` before them, since the schema, not the yaml file, says which keys exist."""
    parser = OverridesParser.create()
    forced = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            if "=" not in text:
                raise ValueError(f"{text!r} does not set anything: write key=value.") from None
            reason = str(error).splitlines()[0].strip()
            raise ValueError(f"{text!r} is not a Hydra override ({reason}): put its value in quotes.") from None
        key = override.get_key_element().lstrip("+~")
        if override.type == OverrideType.DEL:
            raise ValueError(f"{text!r} would remove a key, which cannot be: set {key} to null or to its default.")
        if override.is_sweep_override():
            raise ValueError(
                f"{text!r} holds more than one value: write a list as {key}=[a,b], one run takes no other."
            )
        if not _exists(key, keys) and not _is_section(key, keys):
            raise _unknown(key, keys, COMMAND_LINE)
        forced.append("++" + text.lstrip("+"))
    return forced


def _choices(overrides: Sequence[str], keys: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What overrides such as ``model=llama3-70b`` choose of the groups, and the other overrides."""
    chosen, others = {}, []
    for text in overrides:
        group, _, option = text.lstrip("+").partition("=")
        if group not in GROUPS or option.startswith("{"):
            others.append(text)
            continue
        files = {path.stem: path for path in sorted((config_directory() / group).glob("*.yaml"))}
        if option not in files:
            raise ValueError(f"There is no {group}={option} ({COMMAND_LINE}): choose one of {', '.join(files)}.")
        unknown = [key for key in yaml.safe_load(files[option].read_text()) if f"{group}.{key}" not in keys]
        if unknown:
            raise ValueError(
                f"{text} ({COMMAND_LINE}) sets {group}.{unknown[0]}, which this command does not have: set keys of its "
                "own one by one."
            )
        chosen[group] = option
    return chosen, others


def _exists(key: str, keys: Mapping[str, Any]) -> bool:
    return key in keys or any(_is_mapping(keys[known]) and key.startswith(f"{known}.") for known in keys)


def _is_section(key: str, keys: Mapping[str, Any]) -> bool:
    return any(known.startswith(f"{key}.") for known in keys)


def _compose(path: Path, overrides: list[str], choices: Mapping[str, str]) -> dict[str, Any]:
    """What Hydra makes of the file: keys and values, interpolations untouched. ``choices`` of groups lie over what the
    file says itself, or take the place of what its own list of defaults chooses."""
    search = str(config_directory()).replace("'", r"\'")
    # Whoever calls us may be a Hydra program itself, and there is one global Hydra; NeMo has a group "trainer" in it.
    callers = get_gh_backup()
    GlobalHydra.instance().clear()
    store = ConfigStore.instance().repo
    hidden = {name: store.pop(name) for name in set(store) - {"hydra"} if isinstance(store[name], dict)}
    try:
        with initialize_config_dir(str(path.parent), job_name="nemo-rlhf", version_base="1.3"):
            given = [*overrides, f"hydra.searchpath=['file://{search}']"]
            listed = _listed(path.stem, given)
            given += [f"{'' if group in listed else '+'}{group}={option}" for group, option in choices.items()]
            composed = compose(path.stem, overrides=given)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as a configuration: {reason}.") from None
    finally:
        store.update(hidden)
        restore_gh_from_backup(callers)
    container = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _listed(name: str, overrides: list[str]) -> set[str]:
    """The groups of which Hydra's list of defaults of this file has a choice."""
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(name, overrides, RunMode.RUN).defaults
    return {entry.config_path.rpartition("/")[0] for entry in defaults if entry.config_path}


def _lay_over(
    node: DictConfig, layer: dict[str, Any], keys: Mapping[str, Any], path: Path, overrides: Sequence[str]
) -> None:
    """Set every value of ``layer`` in ``node``. Raises ValueError for unknown keys and wrong types."""
    overridden = tuple(text.lstrip("+").partition("=")[0] for text in overrides)
    for key, value in _values(layer, "", keys):
        source = COMMAND_LINE if overridden and key.startswith(overridden) else f"from {path}"
        if _is_section(key, keys):
            raise ValueError(
                f"{key}={value} ({source}) sets a section: set one of its keys, such as {_below(key, keys)}."
            )
        if not _exists(key, keys):
            raise _unknown(key, keys, source)
        try:
            OmegaConf.update(node, key, value)
        except OmegaConfBaseException:
            raise ValueError(
                f"{key}={_show(value)} ({source}) has the wrong type: it must be {expected(keys[key])}."
            ) from None


def _values(layer: dict[Any, Any], prefix: str, keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values. An empty section (null, as yaml has it) sets nothing."""
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in keys:
            yield from _values(value, f"{key}.", keys)
        elif value is not None or not _is_section(key, keys):
            yield key, value


def _resolve(node: DictConfig, keys: Mapping[str, Any]) -> None:
    """Replace interpolations by what they stand for."""
    for key in keys:
        section, _, name = key.rpartition(".")
        parent = OmegaConf.select(node, section) if section else node
        if not OmegaConf.is_interpolation(parent, name):
            continue
        text = OmegaConf.to_container(parent, resolve=False)[name]  # type: ignore[call-overload,index]
        try:
            OmegaConf.update(node, key, parent[name])
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{key}={text} cannot be resolved to {expected(keys[key])}: {reason.rstrip('.')}."
            ) from None


def _below(section: str, keys: Mapping[str, Any]) -> str:
    return next(key for key in keys if key.startswith(f"{section}."))


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is dict
