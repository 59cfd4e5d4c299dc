"""From docstrings on this machine to everything the training commands read: data sets, tokenizer, model shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerFast

from summarize_docstrings import corpus, model

MAX_PROMPT_TOKENS = 32
MODEL = "model"  # the Hugging Face directory, below that of the data sets


def prepare(directory: Path, roots: dict[str, Path] | None = None, console: Console | None = None) -> tuple[int, int]:
    """Write the data sets and ``model/`` below ``directory``. Returns the numbers of train and held-out pairs.

    ``roots``: directories to gather from, by name; by default those of ``corpus.default_roots()``.
    """
    console = console or Console()
    roots = corpus.default_roots() if roots is None else roots
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = sum(len(corpus.source_files(root)) for root in roots.values())
        task = progress.add_task("reading source files", total=total)
        gathered = corpus.gather(roots, advance=lambda n: progress.advance(task, n))
    train, heldout = corpus.split_by_module(corpus.deduplicate(gathered))
    tokenizer = model.train_tokenizer(f"{corpus.prompt_of(pair.body)} {pair.summary}" for pair in train)
    corpus.write_datasets(directory, shorten(train, tokenizer), shorten(heldout, tokenizer))
    model.save(directory / MODEL, tokenizer)
    console.print(
        f"{len(gathered)} docstrings with body and summary in {total} files of {', '.join(roots)}: "
        f"{len(train)} pairs to train on, {len(heldout)} held out; a vocabulary of {len(tokenizer)} tokens."
    )
    return len(train), len(heldout)


def shorten(pairs: Sequence[corpus.Pair], tokenizer: PreTrainedTokenizerFast) -> list[corpus.Pair]:
    """The pairs with bodies cut so that no prompt is longer than ``MAX_PROMPT_TOKENS``.

    Bodies that have become equal to an earlier one are dropped.
    """
    budget = MAX_PROMPT_TOKENS - len(tokenizer(corpus.PROMPT_SUFFIX)["input_ids"])
    return corpus.deduplicate(replace(pair, body=model.cut(tokenizer, pair.body, budget)) for pair in pairs)
