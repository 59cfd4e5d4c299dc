"""The console program ``nemo-rlhf``: commands, their arguments, and how errors and exit codes reach the user.

Only what a command needs is imported, when it needs it: help, reports and mistakes in the configuration answer
without loading torch.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from os.path import expanduser
from typing import Any, NoReturn

from nemo_rlhf.cli import help_text
from nemo_rlhf.cli.feedback import add_ways, run_feedback
from nemo_rlhf.cli.launch import launch_if_needed
from nemo_rlhf.cli.stop import heeded

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_INPUT = 2
EXIT_STOPPED = 75

# NeMo's telemetry is off by default and says so when it is imported, on every rank
for _name in ("nv_one_logger.api.config", "nv_one_logger.training_telemetry.api.training_telemetry_provider"):
    logging.getLogger(_name).setLevel(logging.ERROR)
# and megatron-core, in every module, that it found no accelerators, which nothing here requires
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")

_TRAINING = {
    "sft": ("supervised fine-tuning", help_text.SFT),
    "ppo": ("PPO with a reward function", help_text.PPO),
    "ilql": ("offline reinforcement learning from scored dialogues", help_text.ILQL),
    "rft": ("fine-tuning on the best of the policy's own samples", help_text.RFT),
    "reward": ("a reward model from compared or scored responses", help_text.REWARD),
}


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are reported like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help).")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    A ValueError or OSError that this package raised (without an error number) is wrong input, or something else that
    only the user can mend, as is a full disk: one sentence goes to stderr. Every other exception is a failure and
    keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.formatwarning = lambda message, *where: f"nemo-rlhf: warning: {message}\n"
    try:
        options = _parse(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except (ValueError, OSError, RuntimeError) as error:
        if _raised_by_us(error):
            _tell(str(error))
        elif (file := _full_disk(error)) is not None:
            _tell(f"no space left to write {file}: free some, and run again to go on from the last checkpoint.")
        else:
            raise
        return EXIT_WRONG_INPUT


def _parse(arguments: list[str]) -> argparse.Namespace:
    if arguments[:1] == ["preflight"]:  # of job scripts, for nobody to type: not among the commands of --help
        return argparse.Namespace(run=_preflight, words=arguments[1:])
    parser, commands = _parsers()
    name = arguments[0] if arguments else None
    if name in commands:
        # Overrides may stand before and after options, which argparse allows only without sub-commands.
        return commands[name].parse_intermixed_args(arguments[1:])
    return parser.parse_args(arguments)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The whole program's parser, and those of the commands that take overrides."""
    parser = _Parser(
        prog="nemo-rlhf",
        description="Fine-tune language models with reinforcement learning, from a laptop to many nodes.",
        epilog=f"example:\n  nemo-rlhf ppo --help\n\n{help_text.EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, summary: str, text: str, run: Callable[[argparse.Namespace], int]) -> _Parser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=text.replace("{conf}", _conf()) + help_text.EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    training = {name: command(name, summary, text, _train) for name, (summary, text) in _TRAINING.items()}
    for name, sub in training.items():
        sub.set_defaults(command=name)
        sub.add_argument("--config", metavar="FILE", help="yaml file laid over the defaults, yours or a shipped one")
    generate = command("generate", "responses of a model to a file of prompts", help_text.GENERATE, _generate)
    generate.add_argument("checkpoint", metavar="CKPT_DIR", help="Megatron checkpoint or Hugging Face directory")
    generate.add_argument("--prompts", metavar="FILE", required=True, help="file of prompts")
    generate.add_argument("--out", metavar="FILE", required=True, help="jsonl file to write")
    serve = command("serve-reward", "a reward model that answers over HTTP", help_text.SERVE_REWARD, _serve_reward)
    serve.add_argument("checkpoint", metavar="CKPT_DIR", help="reward model: Megatron checkpoint or Hugging Face")
    plan = command("plan", "how to cut a model over a cluster, and what that takes", help_text.PLAN, _plan)
    plan.add_argument("--config", metavar="FILE", help="yaml file laid over the defaults")
    plan.add_argument("--top", type=int, default=3, metavar="N", help="plans to show (default: %(default)s)")
    plan.add_argument(
        "--write", type=expanduser, metavar="FILE", help="yaml file for the --config of the command that is planned for"
    )
    data = command("data", "what a file of records holds, and what is learned from it", help_text.DATA, _data)
    data.add_argument("file", type=expanduser, metavar="FILE", help="file, pattern, datasets directory or hub name")
    data.add_argument(
        "--for",
        dest="purpose",
        choices=["sft", "prompts", "pairs", "scores", "dialogues"],
        help="what it is meant for (default: what its first record is good for)",
    )
    slurm = command("slurm", "the job script of a command, for SLURM", help_text.SLURM, _slurm)
    _slurm_arguments(slurm)
    with_overrides = {**training, "generate": generate, "serve-reward": serve, "plan": plan, "data": data}
    for sub in with_overrides.values():
        sub.add_argument("overrides", metavar="key=value", nargs="*", help="configuration keys, as in Hydra")

    report = command("report", "one HTML page of a run: curves, samples, timings", help_text.REPORT, _report)
    report.add_argument("run_dir", type=expanduser, metavar="RUN_DIR", help="exp_manager.explicit_log_dir of the run")

    feedback = command("feedback", "people compare the policy's answers", help_text.FEEDBACK, run_feedback)
    add_ways(feedback)

    _convert_parsers(command("convert", "convert, compare and describe checkpoints", help_text.CONVERT, _convert))
    return parser, {**with_overrides, "slurm": slurm}


def _slurm_arguments(slurm: _Parser) -> None:
    slurm.add_argument("command", metavar="COMMAND", choices=[*_TRAINING, "convert"], help="what the job runs")
    slurm.add_argument("words", metavar="key=value", nargs="*", help="the command's own words, and slurm.* keys")
    slurm.add_argument("--cluster", metavar="FILE", help="yaml file of the cluster, yours or a shipped one")
    slurm.add_argument("--config", metavar="FILE", help="as of the command itself")
    slurm.add_argument("--out", type=expanduser, metavar="FILE", help="file for the script, which is printed otherwise")
    slurm.add_argument("--after", metavar="JOB", help="number of a job that must have ended well before")
    how = slurm.add_mutually_exclusive_group()
    how.add_argument("--submit", action="store_true", help="submit it, and print the number of the job")
    how.add_argument("--test-only", action="store_true", help="ask SLURM whether and when it would run")


def _convert_parsers(convert: _Parser) -> None:
    ways = convert.add_subparsers(title="ways", metavar="WAY", dest="way", required=True, parser_class=_Parser)

    def way(name: str, summary: str, *places: str) -> _Parser:
        sub = ways.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=help_text.CONVERT + help_text.EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for place in places:
            sub.add_argument(place.lower(), type=expanduser, metavar=place, help="directory")
        return sub

    to_megatron = way("import", "convert Hugging Face to Megatron", "HF_DIR", "CKPT_DIR")
    to_hf = way("export", "convert Megatron to Hugging Face", "CKPT_DIR", "HF_DIR")
    to_hf.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: %(default)s)"
    )
    for sub in (to_megatron, to_hf):
        sub.add_argument("--force", action="store_true", help="replace what is there, once the new one is whole")
        sub.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the work")
    verify = way("verify", "run both and compare; exit code 1 when they disagree", "HF_DIR", "CKPT_DIR")
    verify.add_argument(
        "--prompts", type=expanduser, metavar="FILE", help="jsonl file to compare on (default: random tokens)"
    )
    way("inspect", "say what a checkpoint of either format holds", "CKPT_DIR")


def _conf() -> str:
    from pathlib import Path

    package = Path(__file__).resolve().parents[1]
    return str(package / "conf" if (package / "conf").is_dir() else package.parent / "conf")


def _train(options: argparse.Namespace) -> int:
    from nemo_rlhf.config import load

    cfg: Any = load(options.command, options.overrides, config_file=options.config)
    launch_if_needed(cfg.trainer.devices, cfg.trainer.num_nodes, cfg.model.tensor_model_parallel_size)
    with heeded():
        run: Callable[[Any], int] = getattr(import_module("nemo_rlhf.cli.run"), f"run_{options.command}")
        return run(cfg)


def _generate(options: argparse.Namespace) -> int:
    from nemo_rlhf.config import load, quoted

    given = [("model.restore_from", options.checkpoint), ("data.prompts", options.prompts), ("out", options.out)]
    cfg = load("generate", [*options.overrides, *(f"{key}={quoted(value)}" for key, value in given)])
    launch_if_needed(cfg.trainer.devices, cfg.trainer.num_nodes, cfg.model.tensor_model_parallel_size)
    from nemo_rlhf.cli.run import run_generate

    return run_generate(cfg)


def _serve_reward(options: argparse.Namespace) -> int:
    from nemo_rlhf.config import load, quoted

    cfg = load("serve-reward", [*options.overrides, f"model.restore_from={quoted(options.checkpoint)}"])
    launch_if_needed(cfg.trainer.devices, cfg.trainer.num_nodes, cfg.model.tensor_model_parallel_size)
    from nemo_rlhf.cli.serve import run_serve_reward

    return run_serve_reward(cfg)


def _plan(options: argparse.Namespace) -> int:
    from pathlib import Path

    from nemo_rlhf.cli.plan import run_plan
    from nemo_rlhf.config import load

    cfg = load("plan", options.overrides, config_file=options.config)
    print(run_plan(cfg, options.top, options.write and Path(options.write)), end="")
    return EXIT_DONE


def _data(options: argparse.Namespace) -> int:
    from rich.console import Console

    from nemo_rlhf.cli.data import run_data
    from nemo_rlhf.config import load

    return run_data(options.file, load("data", options.overrides), options.purpose, Console(highlight=False))


def _slurm(options: argparse.Namespace) -> int:
    from nemo_rlhf.cli.slurm import run_slurm

    print(run_slurm(options), end="")
    return EXIT_DONE


def _preflight(options: argparse.Namespace) -> NoReturn:
    from nemo_rlhf.cli import environment

    environment.set_defaults()
    from nemo_rlhf.cli.preflight import run_preflight

    run_preflight(options.words)


def _report(options: argparse.Namespace) -> int:
    from nemo_rlhf.cli.report import write_report

    print(write_report(options.run_dir))
    return EXIT_DONE


def _convert(options: argparse.Namespace) -> int:
    if options.way == "verify":
        return _verify(options)
    if options.way == "inspect":
        return _inspect(options)
    from nemo_rlhf.convert import export_hf, import_hf

    how = {"force": options.force, "workers": options.workers}
    if options.way == "import":
        print(import_hf(options.hf_dir, options.ckpt_dir, **how))
    else:
        print(export_hf(options.ckpt_dir, options.hf_dir, options.max_shard_size, **how))
    return EXIT_DONE


def _inspect(options: argparse.Namespace) -> int:
    import yaml

    from nemo_rlhf.convert import inspect

    print(yaml.safe_dump(inspect(options.ckpt_dir), sort_keys=False), end="")
    return EXIT_DONE


def _verify(options: argparse.Namespace) -> int:
    from nemo_rlhf.convert import verify

    agreements = verify(options.hf_dir, options.ckpt_dir, _texts(options.prompts, options.hf_dir))
    for found in agreements:
        print(
            f"{found.dtype}: {found.num_tokens} tokens, max abs difference {found.max_abs_difference:.2e}, "
            f"cosine {found.cosine:.6f}, top-1 agreement {found.top1:.1%}: "
            + ("agree" if found.first_diverging is None else f"DISAGREE, first in {found.first_diverging}")
        )
    return EXIT_DONE if all(found.first_diverging is None for found in agreements) else EXIT_FAILED


def _texts(prompts: str | None, hf_dir: str) -> list[str]:
    if prompts is None:
        return []
    from nemo_rlhf.convert.locate import read_architecture
    from nemo_rlhf.data.prompts import read_prompts
    from nemo_rlhf.data.tokenizer import load_tokenizer

    longest = read_architecture(hf_dir).max_position_embeddings
    return [prompt.text for prompt in read_prompts(prompts, load_tokenizer(hf_dir), longest)]


def _raised_by_us(error: BaseException) -> bool:
    """Whether our own code raised ``error``: what a library raises is a failure whose traceback is needed."""
    if isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is not None):
        return False
    trace = error.__traceback__
    module = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return module.split(".")[0] == "nemo_rlhf"


def _full_disk(error: BaseException | None) -> str | None:
    """The file that did not fit on its disk, if that is what led to ``error``."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "a file")
        error = error.__cause__ or error.__context__
    return None


def _tell(sentence: str) -> None:
    """Print the sentence, as few times in the whole job as can be: every rank usually finds the same mistake."""
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    if _speaks(rank, sentence):
        where = f" (rank {rank})" if rank else ""
        print(f"nemo-rlhf: error{where}: {sentence}", file=sys.stderr, flush=True)


def _speaks(rank: int, sentence: str) -> bool:
    """Once ranks know of each other, the first that finds a mistake. Before, rank 0, and the first of every other
    node for its own sake: what is wrong there (a file system that is not mounted) rank 0 may not see."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return rank == 0 or int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or rank) == 0
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add(f"nemo_rlhf/told/{sentence}", 1) == 1)
    except RuntimeError:
        # The store ends with the rank that serves it, and that rank has had its say.
        return rank == 0
