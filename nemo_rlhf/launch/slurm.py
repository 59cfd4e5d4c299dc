"""Job scripts: what is to be run, and a description of the cluster, become one readable script for sbatch.

The script is ``job.sh.j2`` beside this file. Everything a user wrote is quoted where the shell or sbatch would read it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nemo_rlhf.config.slurm import SlurmSectionConfig, check_writable, option_words


@dataclass(frozen=True)
class Job:
    """One command of this program, with what SLURM and the checks before its start must know of it."""

    name: str
    command: Sequence[str]  # the whole command line, without quotes
    reads: str  # file or directory that every node must see
    writes: str  # directory that every node must be able to write to
    num_nodes: int = 1
    num_local: int = 1  # processes on each node
    gpus: int = 0  # on each node
    resumes: bool = False  # whether the same command goes on after exit codes 69 and 75
    after: str | None = None  # number of a job that must end well before this one starts

    @property
    def num_tasks(self) -> int:
        return self.num_nodes * self.num_local

    @property
    def lines(self) -> list[str]:
        """The command in the shell's quotes: the program and the name of its command, then one argument a line."""
        words = [quote(word) for word in self.command]
        return [" ".join(words[:2]), *words[2:]]


def render(job: Job, slurm: SlurmSectionConfig) -> str:
    """The text of the job script.

    Raises:
        ValueError: a word of the command is one that no script can hold.
    """
    for word in (*job.command, job.reads, job.writes):
        check_writable(word, f"The command has {word[:80]!r}")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = quote
    return environment.get_template("job.sh.j2").render(job=job, slurm=slurm, directives=_directives(job, slurm))


def quote(word: str) -> str:
    """``word`` as bash reads it back. Control characters are written as signs, since sbatch refuses scripts that have
    \\r\\n, and reads lines that begin with #SBATCH."""
    if not any(ord(sign) < 32 or ord(sign) == 127 for sign in word):
        return shlex.quote(word)
    signs = (f"\\x{ord(sign):02x}" if ord(sign) < 32 or ord(sign) == 127 else sign for sign in _escaped(word, "\\'"))
    return f"$'{''.join(signs)}'"


def directive(option: str) -> str:
    """An option as sbatch reads it back from a line of directives: it knows quotes, and backslashes within them."""
    words = (
        word if _PLAIN.fullmatch(word) else f'"{_escaped(word, chr(92) + chr(34))}"' for word in option_words(option)
    )
    return " ".join(words)


def _escaped(word: str, signs: str) -> str:
    return "".join(f"\\{sign}" if sign in signs else sign for sign in word)


_PLAIN = re.compile(r"[\w.@+=/%-][\w.@+,:=/%&|*!()\[\]-]*")


def _directives(job: Job, slurm: SlurmSectionConfig) -> list[str]:
    """Options of sbatch in the order in which a reader looks for them."""
    gpus = f"{slurm.gpu_type}:{job.gpus}" if slurm.gpu_type else str(job.gpus)
    return [
        f"--job-name={job.name}",
        *(f"--{name}={value}" for name in ("account", "partition", "qos") if (value := getattr(slurm, name))),
        f"--nodes={job.num_nodes}",
        f"--ntasks-per-node={job.num_local}",
        *([f"--gpus-per-node={gpus}"] if job.gpus else []),
        *([f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []),
        *([f"--mem={slurm.memory}"] if slurm.memory else []),
        *(["--exclusive"] if slurm.exclusive else []),
        f"--time={slurm.time}",
        f"--signal=USR1@{slurm.signal_s}",
        "--requeue" if slurm.max_requeues else "--no-requeue",
        "--open-mode=append",
        directive(f"--output={slurm.log_dir}/%x-%j.log"),
        *([f"--dependency=afterok:{job.after}", "--kill-on-invalid-dep=yes"] if job.after else []),
        *map(directive, slurm.options),
    ]
