"""From yaml files and overrides to one checked configuration object.

Hydra composes the yaml files; what comes out is laid over the schema key by key, so that a wrong key or type is told
in one sentence that names it. Layers, the later one wins: the schema's defaults, ``conf/<command>.yaml``, the user's
own file, overrides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload
from unittest.mock import patch

import yaml
from hydra import __file__ as hydra_package
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.initialize import get_gh_backup, restore_gh_from_backup
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_rlhf.config.commands import COMMANDS
from nemo_rlhf.config.data import DataCommandConfig
from nemo_rlhf.config.dumping import note_interpolations, refuse_masks
from nemo_rlhf.config.keys import expected, schema_keys
from nemo_rlhf.config.overrides import COMMAND_LINE, exists, is_section, literal, read_override, unknown_key
from nemo_rlhf.config.paths import locate
from nemo_rlhf.config.plan import PlanConfig
from nemo_rlhf.config.scalars import Reader, Scalar, first_place, is_null, shown, typed
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
from nemo_rlhf.config.sources import KINDS
from nemo_rlhf.config.validate import require_keys, validate

ConfigFile = str | Path | None
Supplied = Collection[str]

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
    command: Literal["slurm"],
    overrides: Sequence[str] = (),
    *,
    config_file: ConfigFile = None,
    supplied: Supplied = (),
    absolute: bool = True,
) -> SlurmConfig: ...
@overload
def load(
    command: str,
    overrides: Sequence[str] = (),
    *,
    config_file: ConfigFile = None,
    supplied: Supplied = (),
    absolute: bool = True,
) -> Config | DataCommandConfig | PlanConfig | SlurmConfig: ...
def load(
    command: str,
    overrides: Sequence[str] = (),
    *,
    config_file: ConfigFile = None,
    supplied: Supplied = (),
    absolute: bool = True,
) -> Config | DataCommandConfig | PlanConfig | SlurmConfig:
    """The configuration of ``command`` ("ppo", "sft", "ilql", "rft", "reward", "generate", "serve-reward", "data",
    "plan" or "slurm"), in its class.

    ``overrides`` are Hydra's ``key=value``, and ``model=llama3-70b`` takes a file of the group ``conf/model``;
    ``config_file`` is a yaml file of the user, or the name of a shipped one (``examples/llama3_8b_ppo``); ``supplied``
    names required keys that the caller has in memory ("data.prompts", "reward.function"), which stay None. Paths become
    absolute, from the working directory of now; without ``absolute`` only their ``~`` is replaced. Raises ValueError
    with one sentence for whatever is wrong.
    """
    if command not in COMMANDS:
        raise ValueError(f"There is no configuration for {command!r}: choose one of {', '.join(COMMANDS)}.")
    keys = schema_keys(COMMANDS[command])  # type: ignore[arg-type]
    chosen, overrides = _choices(overrides, keys)
    given = [read_override(text, keys) for text in overrides]
    base = config_directory() / f"{command}.yaml"
    node = OmegaConf.structured(COMMANDS[command])
    path = base
    if config_file is not None:
        path = find_config_file(config_file)
        _lay_over(node, _compose(base, {}), keys, f"from {base}")
    _lay_over(node, _compose(path, chosen), keys, f"from {path}")
    for key, value in given:
        _lay_over(node, _nested(key, value), keys, COMMAND_LINE)
    written = OmegaConf.to_container(node, resolve=False)
    _resolve(node, keys)
    require_keys(node, command, supplied)
    for key in supplied:
        OmegaConf.update(node, key, None)
    cfg = _to_object(node, keys)
    assert isinstance(cfg, COMMANDS[command])
    locate(cfg, absolute=absolute)
    note_interpolations(cfg, written)
    refuse_masks(cfg)
    validate(cfg)
    return cfg


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
    for path in (Path(name).expanduser(), shipped / name, shipped / f"{name}.yaml"):
        if path.is_file():
            if path.suffix != ".yaml":
                raise ValueError(f"{path} cannot be used as a configuration: its name must end in .yaml.")
            return path.resolve()
    files = sorted(path.relative_to(shipped) for path in shipped.rglob("*.yaml"))
    names = [path.with_suffix("").as_posix() for path in files if path.parent.name not in GROUPS]
    raise ValueError(f"There is no configuration file {name}: give a path, or a shipped one of {', '.join(names)}.")


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


def _compose(path: Path, choices: Mapping[str, str]) -> dict[str, Any]:
    """What Hydra makes of the file: keys and values, whose scalars are ``Scalar``. ``choices`` of groups lie over what
    the file says itself, or take the place of what its own list of defaults chooses."""
    search = str(config_directory()).replace("'", r"\'")
    # Whoever calls us may be a Hydra program itself, and there is one global Hydra; NeMo has a group "trainer" in it.
    callers = get_gh_backup()
    GlobalHydra.instance().clear()
    store = ConfigStore.instance().repo
    hidden = {name: store.pop(name) for name in set(store) - {"hydra"} if isinstance(store[name], dict)}
    reader = Reader()
    try:
        with (
            patch.object(OmegaConf, "load", _load_with(reader)),
            initialize_config_dir(str(path.parent), job_name="nemo-rlhf", version_base="1.3"),
        ):
            given = [f"hydra.searchpath=['file://{search}']"]
            listed = _listed(path.stem, given)
            given += [f"{'' if group in listed else '+'}{group}={option}" for group, option in choices.items()]
            composed = compose(path.stem, overrides=given)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path} cannot be read as a configuration: {reason}.") from None
    finally:
        store.update(hidden)
        restore_gh_from_backup(callers)
    container = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(container, dict)
    return {str(key): reader.restore(value) for key, value in container.items()}


def _load_with(reader: Reader) -> Callable[[Any], Any]:
    """``OmegaConf.load`` for Hydra, whose own files stay as they are."""
    load, hydras = OmegaConf.load, Path(hydra_package).parent

    def read(file: Any) -> Any:
        is_hydras = hydras in Path(getattr(file, "name", hydras / "x")).resolve().parents
        return load(file) if is_hydras else reader.load(file)

    return read


def _listed(name: str, overrides: list[str]) -> set[str]:
    """The groups of which Hydra's list of defaults of this file has a choice."""
    loader = GlobalHydra.instance().config_loader()
    defaults = loader.compute_defaults_list(name, overrides, RunMode.RUN).defaults
    return {entry.config_path.rpartition("/")[0] for entry in defaults if entry.config_path}


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def _sources_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    kind = entry.get("kind")
    schema = KINDS.get(kind.text) if isinstance(kind, Scalar) else None
    return dict(schema_keys(schema)) if schema is not None else {"kind": str}  # type: ignore[arg-type]


# Types of what is in mappings that the schema leaves open.
_ENTRIES: dict[str, Any] = {
    "reward.sources": _sources_entry,
    "exp_manager.wandb_logger_kwargs": dict.fromkeys(
        (
            "name",
            "project",
            "id",
            "group",
            "entity",
            "notes",
            "job_type",
            "version",
            "prefix",
            "save_dir",
            "dir",
        ),
        str | None,
    ),
}


def _lay_over(node: DictConfig, layer: dict[str, Any], keys: Mapping[str, Any], source: str) -> None:
    """Set every value of ``layer`` in ``node``. Raises ValueError for unknown keys and wrong types."""
    for key, value in _values(layer, "", keys):
        where = first_place(value, source)
        if is_section(key, keys):
            said = f"{key}={shown(value)} ({where})"
            raise ValueError(f"{said} sets a section: set one of its keys, such as {_below(key, keys)}.")
        if not exists(key, keys):
            raise unknown_key(key, keys, where)
        given = typed(value, _ENTRIES.get(key, keys.get(key, Any)), key, where)
        try:
            OmegaConf.update(node, key, given)
        except (OmegaConfBaseException, ValueError):
            said = f"{key}={shown(value)} ({where})"
            raise ValueError(f"{said} has the wrong type: it must be {expected(keys.get(key))}.") from None


def _values(layer: dict[Any, Any], prefix: str, keys: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and values. An empty section (null, as yaml has it) sets nothing."""
    for name, value in layer.items():
        key = f"{prefix}{shown(name)}"
        if isinstance(value, dict) and key not in keys and (value or is_section(key, keys)):
            yield from _values(value, f"{key}.", keys)
        elif not is_null(value) or not is_section(key, keys):
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
            value = parent[name]
            OmegaConf.update(node, key, literal(value) if isinstance(value, str) else value)
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{key}={text} cannot be resolved to {expected(keys[key])}: {reason.rstrip('.')}."
            ) from None


def _to_object(node: DictConfig, keys: Mapping[str, Any]) -> Any:
    for key in keys:
        section, _, name = key.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(node, section) if section else node, name):
            raise ValueError(f"{key} is ???, which stands for a value that is missing: set it.")
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"The configuration has a value that stands for nothing ({reason}): write \\${{ to mean the characters ${{."
        ) from None


def _below(section: str, keys: Mapping[str, Any]) -> str:
    return next(key for key in keys if key.startswith(f"{section}."))
