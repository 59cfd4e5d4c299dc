"""``nemo-rlhf feedback``: the comparison page, pairs in and out of the store, who may compare, scripted annotators."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rlhf.cli import help_text, stop
from nemo_rlhf.config.feedback import ServeConfig, SimulateConfig
from nemo_rlhf.feedback import require_libraries
from nemo_rlhf.feedback.records import FORMS

if TYPE_CHECKING:
    from nemo_rlhf.feedback.simulate import Prefer
    from nemo_rlhf.feedback.store import Store

EXIT_DONE, EXIT_STOPPED = 0, 75
_POLL_S = 0.5  # between looks for new tasks


def add_ways(feedback: argparse.ArgumentParser) -> None:
    """The arguments of every ``nemo-rlhf feedback WAY``."""
    ways = feedback.add_subparsers(title="ways", metavar="WAY", dest="way", required=True, parser_class=type(feedback))

    def way(name: str, summary: str) -> argparse.ArgumentParser:
        sub = ways.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=help_text.FEEDBACK + help_text.EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument(
            "--store", metavar="URL", required=True, help="sqlite:///FILE, the path of that file, or postgresql://..."
        )
        sub.add_argument(
            "--run", dest="run_dir", metavar="RUN_DIR", required=True, help="directory of the run, or ppo.feedback.run"
        )
        return sub

    _serve_arguments(way("serve", "the page on which people compare answers"))
    add_import = way("import", "take pairs into the store")
    add_import.add_argument("file", type=expanduser, metavar="FILE", help="jsonl file or datasets directory of pairs")
    export = way("export", "write what was compared as pairs")
    export.add_argument(
        "out", type=expanduser, metavar="OUT", help=".jsonl file, or a directory without suffix, for datasets"
    )
    export.add_argument(
        "--form",
        default="pairs",
        choices=FORMS,
        help="prompt, chosen and rejected as text, or two whole chats (default: %(default)s)",
    )
    export.add_argument("--force", action="store_true", help="replace what is there, once the new one is whole")
    invite = way("invite", "let somebody compare, or end that")
    invite.add_argument("name", metavar="NAME", help="of the annotator")
    kind = invite.add_mutually_exclusive_group()
    kind.add_argument("--admin", action="store_true", help="may see how the run stands, and export")
    kind.add_argument("--revoke", action="store_true", help="end the access of NAME; the answers stay")
    simulate = way("simulate", "answer with scripted annotators, for tests and dry runs")
    simulate.add_argument(
        "--prefer", metavar="MODULE:FUNCTION", required=True, help="from a prompt and an answer to a score"
    )
    defaults = SimulateConfig()
    simulate.add_argument(
        "--noise",
        type=float,
        default=defaults.noise,
        metavar="P",
        help="chance that the other answer is preferred (default: %(default)s)",
    )
    simulate.add_argument(
        "--annotators", type=int, default=defaults.annotators, metavar="N", help="how many (default: %(default)s)"
    )
    simulate.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="of the noise")
    how = simulate.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="answer what waits, and end (the default)")
    how.add_argument("--watch", action="store_true", help="wait for more until SIGTERM or Ctrl-C")


def _serve_arguments(serve: argparse.ArgumentParser) -> None:
    defaults = ServeConfig()
    serve.add_argument(
        "--host", default=defaults.host, help="address to listen on; others than this machine's need a secret"
    )
    serve.add_argument("--port", type=int, default=defaults.port, help="0: a free one (default: %(default)s)")
    serve.add_argument(
        "--guidelines", type=expanduser, metavar="FILE.md", help="what annotators are told, in place of what they were"
    )
    serve.add_argument(
        "--secret-file",
        type=expanduser,
        metavar="FILE",
        help="signs the sessions (default: of NEMO_RLHF_FEEDBACK_SECRET, or made)",
    )
    serve.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="name under which a proxy shows the page; this machine's names and all addresses are allowed anyway",
    )


def run_feedback(options: argparse.Namespace) -> int:
    """Run the command; what it prints goes to stdout.

    Raises:
        ValueError: wrong input.
    """
    require_libraries()
    from sqlalchemy.exc import DatabaseError

    from nemo_rlhf.feedback.store import Store

    ways = {"serve": _serve, "import": _import, "export": _export, "invite": _invite, "simulate": _simulate}
    store = Store.open(options.store)
    try:
        return ways[options.way](store, options)
    except DatabaseError as error:
        raise ValueError(store.database.reason(error)) from error
    finally:
        store.close()


def _run_id(store: Store, options: argparse.Namespace, *, create: bool = False) -> int:
    from nemo_rlhf.feedback.store import run_name

    found = _find_run(store, options)
    return store.run(run_name(options.run_dir), create=create) if found is None else found


def _find_run(store: Store, options: argparse.Namespace) -> int | None:
    """The run of this name, or else of this directory; None: there is none (yet)."""
    from nemo_rlhf.feedback.store import run_name

    found = store.find_run(options.run_dir)
    return store.find_run(run_name(options.run_dir)) if found is None else found


def _serve(store: Store, options: argparse.Namespace) -> int:
    from nemo_rlhf.feedback.web.server import read_guidelines, serve

    config = ServeConfig(options.host, options.port, options.secret_file, tuple(options.allow_host))
    run_id = _run_id(store, options)
    if options.guidelines is not None:
        store.run(store.info(run_id).name, guidelines=read_guidelines(Path(options.guidelines)))
    return serve(store, run_id, config)


def _import(store: Store, options: argparse.Namespace) -> int:
    from nemo_rlhf.data.files import read_records
    from nemo_rlhf.feedback.exchange import import_pairs
    from nemo_rlhf.feedback.given import read_pair

    # All of the file before the run, of which a wrong line leaves no trace.
    pairs = [read_pair(where, record) for where, record in read_records(options.file, "pair")]
    num_new, num_known = import_pairs(store, _run_id(store, options, create=True), pairs)
    print(f"{num_new} new pairs" + (f", {num_known} were there already" if num_known else ""))
    return EXIT_DONE


def _export(store: Store, options: argparse.Namespace) -> int:
    from nemo_rlhf.feedback.exchange import export_file

    run_id = _run_id(store, options)
    num_compared = len(store.comparison_ids(run_id))
    num = export_file(store, run_id, options.form, Path(options.out), force=options.force)
    print(f"{num} pairs of {num_compared} comparisons in {options.out} (the others say of no answer that it is better)")
    return EXIT_DONE


def _invite(store: Store, options: argparse.Namespace) -> int:
    from nemo_rlhf.feedback.accounts import invite, revoke

    run_id = _run_id(store, options)
    if options.revoke:
        revoke(store, run_id, options.name)
        print(f"{options.name} has no access any more.")
        return EXIT_DONE
    print(invite(store, run_id, options.name, admin=options.admin))
    print(
        f"This token lets {options.name} in, and is shown only now. Inviting the same name again replaces it.",
        file=sys.stderr,
    )
    return EXIT_DONE


def _simulate(store: Store, options: argparse.Namespace) -> int:
    from nemo_rlhf.rollout.named import load_function

    config = SimulateConfig(noise=options.noise, annotators=options.annotators, seed=options.seed)
    prefer = load_function(options.prefer, "--prefer")
    num, stopped = 0, False
    try:
        with stop.heeded():
            for answered in _rounds(store, options, prefer, config):
                num += answered
            stopped = stop.noted()
    except KeyboardInterrupt:
        if not options.watch:
            raise
    print(f"{num} simulated comparisons")
    return EXIT_STOPPED if stopped else EXIT_DONE


def _rounds(store: Store, options: argparse.Namespace, prefer: Prefer, config: SimulateConfig) -> Iterator[int]:
    """How many tasks were answered, round by round, until none waits, or with --watch until a signal comes."""
    from nemo_rlhf.feedback.simulate import SimulatedAnnotators

    while options.watch and _find_run(store, options) is None:  # may still have to begin
        if stop.noted():
            return
        time.sleep(_POLL_S)
    annotators = SimulatedAnnotators(store, _run_id(store, options), prefer, config)
    while not stop.noted():
        answered = annotators.answer_each()
        yield answered
        if not answered:
            if not options.watch:
                return
            time.sleep(_POLL_S)
