"""``nemo-rlhf slurm``: the job script of a command, printed, written, submitted, or shown to SLURM."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_rlhf.config import load
from nemo_rlhf.config.dumping import write_private
from nemo_rlhf.config.slurm import SlurmSectionConfig
from nemo_rlhf.launch.slurm import Job, render

_SHAPE = re.compile(r"slurm\.(num_)?(nodes|gpus_per_node|ntasks\w*|devices|tasks\w*)$")

_WAITS = re.compile(r"-d|--dependency(?=[=\s]|$)")


def run_slurm(options: Namespace) -> str:
    """What the terminal shows: the script, the file that it went to, the number of the submitted job, or what SLURM
    says of it.

    Raises:
        ValueError: for whatever is wrong with the command, its configuration or that of the cluster, and with SLURM's
            own words when it refuses the job.
    """
    slurm, words = _cluster(options.words, options.cluster)
    if options.after is not None and not options.after.isdigit():
        raise ValueError(f"--after={options.after} is not the number of a job: give the one that --submit printed.")
    if options.after is not None and any(_WAITS.match(option) for option in slurm.options):
        raise ValueError(f"--after={options.after} and a --dependency of slurm.options exclude each other: keep one.")
    name = slurm.job_name or f"nemo-rlhf-{options.command}"
    if options.command == "convert":
        job = _conversion(name, words, options, slurm)
    else:
        job = _training(name, words, options, slurm)
    script = render(job, slurm)
    shown = script
    if options.out is not None:
        out = Path(options.out)
        if not out.parent.is_dir():
            raise ValueError(f"--out={out}: there is no directory {out.parent}, create it first.")
        write_private(out, script, 0o700)  # it holds what slurm.environment does
        shown = f"{out}\n"
    if options.test_only:
        done = _sbatch(script, "--test-only")
        return f"{_said(done)}\n"
    if options.submit:
        Path(slurm.log_dir).mkdir(parents=True, exist_ok=True)
        return f"{_number(_sbatch(script, '--parsable'))}\n"
    return shown


def _cluster(words: Sequence[str], file: str | None) -> tuple[SlurmSectionConfig, list[str]]:
    """The job's own section, and the words that are not for it."""
    ours = [word for word in words if word.lstrip("+~").startswith("slurm.")]
    for word in ours:
        key = word.lstrip("+~").partition("=")[0]
        if _SHAPE.match(key):
            raise ValueError(
                f"There is no configuration key {key}: nodes, processes and GPUs of the job are trainer.num_nodes and "
                "trainer.devices of its command."
            )
    return load("slurm", ours, config_file=file, absolute=False).slurm, [word for word in words if word not in ours]


def _training(name: str, overrides: list[str], options: Namespace, slurm: SlurmSectionConfig) -> Job:
    # relative paths stay relative, to the directory where the job is submitted
    cfg: Any = load(options.command, overrides, config_file=options.config, absolute=False)
    devices = cfg.trainer.devices
    config = [] if options.config is None else [f"--config={options.config}"]
    return Job(
        name=name,
        command=["nemo-rlhf", options.command, *config, *overrides],
        reads=cfg.model.restore_from,
        writes=_as_operand(cfg.exp_manager.explicit_log_dir),
        num_nodes=cfg.trainer.num_nodes,
        num_local=devices,
        gpus=devices if slurm.gpus else 0,
        resumes=True,
        after=options.after,
    )


def _conversion(name: str, words: list[str], options: Namespace, slurm: SlurmSectionConfig) -> Job:
    if len(words) != 3 or words[0] not in ("import", "export"):
        raise ValueError(
            "A conversion is written as convert import HF_DIR CKPT_DIR or convert export CKPT_DIR HF_DIR, "
            f"not convert {' '.join(words)}."
        )
    if options.config is not None:
        raise ValueError(f"--config={options.config} has no use in a conversion: leave it out.")
    return Job(
        name=name,
        command=["nemo-rlhf", "convert", *words, f"--workers={slurm.cpus_per_task or 1}"],
        reads=os.path.expanduser(words[1]),
        writes=_as_operand(str(Path(words[2]).expanduser().parent)),
        after=options.after,
    )


def _as_operand(path: str) -> str:
    """``path`` in a form that no program takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def _sbatch(script: str, option: str) -> subprocess.CompletedProcess[str]:
    """Raises ValueError with SLURM's own words when it refuses the script."""
    if shutil.which("sbatch") is None:
        raise ValueError("There is no sbatch on this machine: write the script with --out, and submit it from another.")
    done = subprocess.run(
        ["sbatch", option], input=script, capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode != 0:
        raise ValueError(f"SLURM refuses the job: {' '.join(_said(done).replace('error: ', '').split())}")
    return done


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return re.sub(r"^sbatch: ", "", (done.stdout + done.stderr).strip(), flags=re.MULTILINE)


def _number(done: subprocess.CompletedProcess[str]) -> str:
    """Of the job that was submitted. What a site's plugins have said besides goes to the terminal."""
    sys.stderr.write(done.stderr)
    numbers = re.findall(r"^(\d+)(?:;.*)?$", done.stdout, re.MULTILINE)  # a cluster's name may follow
    if not numbers:
        raise ValueError(f"sbatch gave no job number but {_said(done)!r}: look for the job with squeue.")
    return str(numbers[-1])
