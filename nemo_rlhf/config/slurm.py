"""What ``nemo-rlhf slurm`` must know of a cluster: account, limits, container, environment, requeueing.

Nodes, processes and GPUs are not here: they are ``trainer.num_nodes`` and ``trainer.devices`` of the command that the
job runs, so that the two cannot disagree.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

from nemo_rlhf.config.rules import COUNT, NOT_NEGATIVE, Rule


@dataclass
class ContainerConfig:
    runtime: str | None = None  # null: none | "pyxis" (enroot) | "apptainer"
    image: str | None = None  # what the runtime calls an image: a .sqsh or .sif file, or a reference
    mounts: list[str] = field(default_factory=list)  # "source:target", beside working directory and log_dir


@dataclass
class SlurmSectionConfig:
    job_name: str | None = None  # null: nemo-rlhf-<command>
    account: str | None = None  # who pays; null: your default
    partition: str | None = None  # null: the cluster's default
    qos: str | None = None  # quality of service; null: your default
    time: str = "04:00:00"  # limit of one run of the job, as sbatch takes it
    gpus: bool = True  # ask for trainer.devices GPUs on every node
    gpu_type: str | None = None  # "h100", if the cluster has several
    cpus_per_task: int | None = (
        None  # cores of each process; null: an equal share of a node that is ours, or the cluster's default
    )
    memory: str | None = "0"  # of each node, "500G"; "0": all of it; null: the cluster's default
    exclusive: bool = True  # nobody else on the nodes
    options: list[str] = field(default_factory=list)  # further options of sbatch, "--constraint=ib"
    container: ContainerConfig = field(default_factory=ContainerConfig)
    modules: list[str] = field(default_factory=list)  # for "module load", outside the container
    setup: list[str] = field(default_factory=list)  # lines of shell before anything starts, such as activating a venv
    environment: dict[str, str] = field(default_factory=dict)  # variables to export, NCCL's among them
    signal_s: int = 300  # seconds before the time limit at which the run is told to save and end
    max_requeues: int = 3  # times in a row that a job goes back into the queue without a new checkpoint
    preflight_timeout_s: int = 300  # seconds for every node to start its checks; fetching an image counts
    min_free_gib: float = 50.0  # that must be free where the run directory is
    log_dir: str = "."  # where the logs go; it must exist when the job starts


@dataclass
class SlurmConfig:
    """Configuration of ``nemo-rlhf slurm``."""

    slurm: SlurmSectionConfig = field(default_factory=SlurmSectionConfig)


_RANGES: dict[str, Rule] = {
    "signal_s": COUNT,
    "max_requeues": NOT_NEGATIVE,
    "preflight_timeout_s": COUNT,
    "min_free_gib": NOT_NEGATIVE,
}
_TIME = re.compile(r"[0-9]+(:[0-5]?[0-9]){0,2}|[0-9]+-[0-9]+(:[0-5]?[0-9]){0,2}")
# what SLURM takes as a name as it is; in names of files it would put something else for a %
_PLAIN = re.compile(r"[\w.@+,:=/-]+", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_LOG_DIR = re.compile(r"[^%\\]+")
_OPTION = re.compile(r"(?P<name>--[a-z][a-z0-9-]*|-[A-Za-z])(?P<rest>.*)", re.DOTALL)
_OURS = (
    "nodes", "ntasks", "gpus", "cpus-per-gpu", "gres", "job-name", "output", "error", "time", "account",
    "partition", "qos", "mem", "cpus-per-task", "exclusive", "signal", "requeue", "no-requeue", "open-mode",
    "array", "ntasks-per-node", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket", "gpus-per-node",
    "gpus-per-task", "gpus-per-socket",
)  # fmt: skip
_OURS_SHORT = tuple("NnGJoetApqca")
# variables of bash that it sets itself or that change how it reads, and those of the job script
_TAKEN = re.compile(
    r"_|BASHOPTS|BASHPID|BASH_(ARG[CV]|COMMAND|LINENO|SOURCE|SUBSHELL|VERSINFO)|COMP_WORDBREAKS|DIRSTACK|EPOCH\w+|E?UID"
    r"|FUNCNAME|GROUPS|HISTCMD|IFS|LINENO|OLDPWD|OPTIND|PIPESTATUS|POSIXLY_CORRECT|PPID|PWD|S?RANDOM|SECONDS|SHELLOPTS"
    r"|SHLVL|SLURM_EXPORT_ENV|MASTER_(ADDR|PORT)|attempt|before|begun_at|code|container|cores|culprit|ends|first|in_vain"
    r"|inside|job_logs|keeper|log|log_dir|logs|me|mounts|newest|nodes?|run_dir|state|task|try"
)
_LONGEST_OPTION = 4096  # SLURM's own buffer for a word of a directive has 8192 bytes, quotes counted
_LONGEST_VARIABLE = 100_000  # Linux starts no program with more than 128 KiB in one


def check_slurm(cfg: SlurmConfig) -> None:
    """Raises ValueError for a value that SLURM, or the script, could not be given."""
    slurm = cfg.slurm
    for name, (words, holds) in _RANGES.items():
        if not holds(getattr(slurm, name)):
            raise ValueError(f"slurm.{name}={getattr(slurm, name)} is out of range: it must be {words}.")
    if slurm.cpus_per_task is not None and slurm.cpus_per_task < 1:
        raise ValueError(f"slurm.cpus_per_task={slurm.cpus_per_task} is out of range: it must be 1 or more, or null.")
    if not _TIME.fullmatch(slurm.time):
        raise ValueError(f"slurm.time={slurm.time} is not a time: write hours:minutes:seconds, such as 04:00:00.")
    limit_s = _seconds(slurm.time)
    if 0 < limit_s <= slurm.signal_s:  # 0: no limit
        raise ValueError(
            f"slurm.signal_s={slurm.signal_s} leaves nothing of slurm.time={slurm.time}, which is {limit_s} s: the run "
            "would be told to end as soon as it begins; lower the one or raise the other."
        )
    if not _LOG_DIR.fullmatch(slurm.log_dir) or not is_printable(slurm.log_dir):
        raise ValueError(
            f"slurm.log_dir={slurm.log_dir!r} cannot be given to SLURM, which replaces % and \\ in names of files: "
            "choose another directory."
        )
    for name in ("job_name", "account", "partition", "qos", "gpu_type", "memory"):
        value = getattr(slurm, name)
        if value is not None and not _PLAIN.fullmatch(value):
            raise ValueError(
                f"slurm.{name}={value!r} cannot stand in a job script: use letters (a to z), digits and _ . - / : = "
                "only."
            )
    if "/" in (slurm.job_name or ""):
        raise ValueError(f"slurm.job_name={slurm.job_name!r} is also the name of the log: leave out the /.")
    for option in slurm.options:
        _check_option(option)
    for name, value in slurm.environment.items():
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"slurm.environment has {name!r}, which cannot be the name of a variable: rename it.")
        if _TAKEN.fullmatch(name):
            raise ValueError(
                f"slurm.environment.{name} would not reach the run, since bash or the job script has that variable for "
                "itself: rename it, or set it in slurm.setup."
            )
        if len(name) + len(value.encode(errors="replace")) > _LONGEST_VARIABLE:
            raise ValueError(f"slurm.environment.{name} is longer than a variable can be: put its value into a file.")
    texts = {"setup": slurm.setup, "modules": slurm.modules, "environment": slurm.environment.values()}
    for name, values in texts.items():
        for value in values:
            check_writable(value, f"slurm.{name} has {brief(value)}")
    _check_container(slurm.container, slurm.log_dir)


def check_writable(text: str, said: str) -> None:
    """Raises ValueError for text that no script, and no argument of a program, can hold."""
    if "\0" in text or any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError(f"{said}, which is no text that a script can hold: take NUL and broken Unicode out of it.")


def is_printable(text: str) -> bool:
    """Whether SLURM takes ``text`` for one word on one line: no control character, line separator or broken Unicode."""
    return not any(unicodedata.category(sign) in ("Cc", "Zl", "Zp", "Cs") for sign in text)


def brief(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:77]!r}..."


def _seconds(time: str) -> int:
    """Of a limit as sbatch takes it: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def option_words(option: str) -> list[str]:
    """An option of sbatch, "--comment=a b", "--comment a b" or "-C ib", as the words that sbatch is to see."""
    found = _OPTION.fullmatch(option)
    assert found is not None
    if not found["rest"][:1].isspace():
        return [option]
    return [found["name"], *([value] if (value := found["rest"].lstrip()) else [])]


def _check_option(option: str) -> None:
    found = _OPTION.fullmatch(option)
    if found is None or (found["name"].startswith("--") and found["rest"] and found["rest"][0] not in "= \t"):
        raise ValueError(
            f"slurm.options has {brief(option)}, which is no option of sbatch: write one as --constraint=ib."
        )
    name, value = found["name"], found["rest"].lstrip("= \t")
    if not is_printable(option.replace("\t", " ")) or len(option.encode()) > _LONGEST_OPTION:
        raise ValueError(
            f"slurm.options has {brief(option)}, which sbatch would not read as one option: it must be one line of at "
            f"most {_LONGEST_OPTION} bytes, without control characters."
        )
    if re.fullmatch(r"""(["']).*\1""", value):
        raise ValueError(
            f"slurm.options has {option!r}, whose quotes sbatch would take for a part of it: leave them out."
        )
    # sbatch takes abbreviations
    long = len(name) > 2 and any(ours == name[2:] or ours.startswith(name[2:]) for ours in _OURS)
    if name == "-a" or (long and "array".startswith(name[2:])):
        raise ValueError(
            f"slurm.options has {option!r}, but one run has one directory, which the jobs of an array would share: "
            "submit a job for each run, with an exp_manager.explicit_log_dir of its own."
        )
    if long or name[1:] in _OURS_SHORT:
        raise ValueError(
            f"slurm.options has {option!r}, which is decided elsewhere: nodes and GPUs by trainer.num_nodes and "
            "trainer.devices, the rest by keys of their own in slurm."
        )


def _check_container(container: ContainerConfig, log_dir: str) -> None:
    if container.runtime not in (None, "pyxis", "apptainer"):
        raise ValueError(f"slurm.container.runtime={container.runtime} is not known: choose pyxis, apptainer or null.")
    if (container.runtime is None) != (container.image is None):
        raise ValueError(
            f"slurm.container.runtime={container.runtime} and slurm.container.image={container.image} belong together: "
            "set both or neither."
        )
    if container.runtime is None and container.mounts:
        raise ValueError("slurm.container.mounts has no use without a container: set slurm.container.runtime, too.")
    if container.runtime is not None and re.search("[:,]", log_dir):
        raise ValueError(
            f"slurm.log_dir={log_dir} cannot be mounted into a container: choose one without : and , in it."
        )
    if container.image is not None and not is_printable(container.image):
        raise ValueError(f"slurm.container.image={container.image!r} has a control character: rename the file.")
    for mount in container.mounts:
        if not re.fullmatch(r"/[^:,\s]*:/[^:,\s]*(:\w+)?", mount, re.ASCII) or not is_printable(mount):
            raise ValueError(f"slurm.container.mounts has {mount!r}: write source:target with two absolute paths.")
