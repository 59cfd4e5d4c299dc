"""A corpus that every machine has: docstrings of the standard library and of the packages nemo_rlhf installs.

A docstring opens with a one-line summary and goes on with a body. The pair (body, summary) is a summarisation task
with a reference answer. Files are parsed, never imported. The split into train and held-out goes by module, and no
text of a held-out pair occurs in train.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Of the packages that nemo_rlhf needs, those with most docstrings: the corpus must not change with what else there is.
PACKAGES = (
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "megatron",
    "networkx",
    "numpy",
    "pandas",
    "rich",
    "scipy",
    "sklearn",
    "torch",
)
PROMPT_SUFFIX = "\nSummary:"

MIN_SUMMARY_WORDS, MAX_SUMMARY_WORDS = 3, 20
MIN_BODY_WORDS, MAX_BODY_WORDS = 8, 80
MIN_OVERLAP = 0.5  # of the summary's content words, this share must stand in the body
MAX_REPEATS = 3  # how often one summary may occur
HELDOUT_PERCENT = 10

_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip", "externals"}
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be by for from get given has have if in into is it its not of on or return returns set "
        "that the this to used using when which will with you",
    )
)


@dataclass(frozen=True)
class Pair:
    """One docstring: where it stands (``module`` is ``package/path.py``), its body and its one-sentence summary."""

    module: str
    body: str
    summary: str


def default_roots() -> dict[str, Path]:
    """Directories to read, by name; a package that is not installed is left out."""
    purelib = Path(sysconfig.get_paths()["purelib"])
    roots = {"stdlib": Path(sysconfig.get_paths()["stdlib"])}
    roots |= {name: purelib / name for name in PACKAGES if (purelib / name).is_dir()}
    return roots


def source_files(root: Path) -> list[Path]:
    """Public python modules under ``root`` in sorted order: no tests, no private packages, nothing vendored."""

    def is_public(path: Path) -> bool:
        *directories, name = path.relative_to(root).parts
        parts = [*directories, name.removesuffix(".py")]
        if any("test" in part or part in _SKIPPED_DIRECTORIES for part in parts):
            return False
        return not any(part.startswith("_") for part in directories)

    return sorted(path for path in root.rglob("*.py") if is_public(path))


def normalise(text: str) -> str:
    """Only the letters and digits, in lower case: what two texts must differ in to count as different."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def plain_text(text: str) -> str:
    """A docstring's text on one line: no doctests, underlines, roles or mark-up; white space collapsed."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if not re.match(r">>>|\.\.\. |\.\. |[-=~^*#`\"']{3,}$", line)]
    text = " ".join(lines)
    text = re.sub(r":[a-z:]+:`~?([^`<]+?)(?: <[^>]*>)?`", r"\1", text)
    text = text.replace("`", "").replace("**", "").replace("::", ":")
    return re.sub(r"\s+", " ", text).strip()


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(body, summary), or None where there is no such pair.

    The summary is the first sentence of the first paragraph. What else that paragraph says opens the body.
    """
    if len(docstring) > 20_000 or not docstring.isascii():
        return None
    first, blank, rest = docstring.partition("\n\n")
    if not blank or ">>>" in first or "::" in first or "%(" in docstring:  # "%(": a template, not yet a text
        return None
    summary, full_stop, more = re.sub(r"(\.)\s+(?=[A-Z])", r"\1\0", plain_text(first)).partition("\0")
    body_words = (more + " " + plain_text(rest) if full_stop else plain_text(rest)).split()[:MAX_BODY_WORDS]
    if not re.fullmatch(r"[A-Z][\w\s,;'()/\-.]*", summary):
        return None
    num_words = len(normalise(summary).split())
    if not MIN_SUMMARY_WORDS <= num_words <= MAX_SUMMARY_WORDS or len(body_words) < MIN_BODY_WORDS:
        return None
    body = " ".join(body_words)
    return (body, summary.rstrip(". ") + ".") if overlap(body, summary) >= MIN_OVERLAP else None


def overlap(body: str, summary: str) -> float:
    """Share of the summary's content words that stand in the body: a summary must follow from what it summarises."""
    words = set(normalise(summary).split()) - _STOP_WORDS
    return len(words & set(normalise(body).split())) / len(words) if words else 0.0


def read_module(path: Path, module: str) -> list[Pair]:
    """The pairs of one file in the order of its classes and functions; none when it is not valid Python."""
    source = path.read_bytes()
    if b'"""' not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and files for other versions of Python: nothing to learn from
        return []
    splits = (split_docstring(ast.get_docstring(node) or "") for node in definitions(tree))
    return [Pair(module, *split) for split in splits if split is not None]


def definitions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Classes, functions and methods, outside in; not what is defined inside functions."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child
        if isinstance(child, ast.ClassDef):
            yield from definitions(child)


def _read_chunk(files: Sequence[tuple[Path, str]]) -> list[Pair]:
    return [pair for path, module in files for pair in read_module(path, module)]


def gather(
    roots: dict[str, Path], *, processes: int = 2, advance: Callable[[int], None] = lambda _: None
) -> list[Pair]:
    """All pairs under ``roots`` in a fixed order. ``advance`` is told how many files were read."""
    files = [(path, f"{name}/{path.relative_to(root)}") for name, root in roots.items() for path in source_files(root)]
    chunks = [files[start : start + 64] for start in range(0, len(files), 64)]
    pairs: list[Pair] = []
    with ProcessPoolExecutor(processes) as pool:
        for chunk, found in zip(chunks, pool.map(_read_chunk, chunks), strict=True):
            pairs.extend(found)
            advance(len(chunk))
    return pairs


def deduplicate(pairs: Iterable[Pair]) -> list[Pair]:
    """Each body once, each summary at most ``MAX_REPEATS`` times, both compared without case and punctuation."""
    bodies: set[str] = set()
    summaries: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        body, summary = normalise(pair.body), normalise(pair.summary)
        if body in bodies or summaries[summary] >= MAX_REPEATS:
            continue
        bodies.add(body)
        summaries[summary] += 1
        kept.append(pair)
    return kept


def split_by_module(pairs: Iterable[Pair], heldout_percent: int = HELDOUT_PERCENT) -> tuple[list[Pair], list[Pair]]:
    """(train, held-out), each shuffled by hash: a module goes whole to one side, whatever other modules there are.

    Held-out pairs whose body or summary also occurs in train are dropped.
    """
    train: list[Pair] = []
    heldout: list[Pair] = []
    for pair in pairs:
        (heldout if _hash(pair.module) % 100 < heldout_percent else train).append(pair)
    bodies = {normalise(pair.body) for pair in train}
    summaries = {normalise(pair.summary) for pair in train}
    unseen = [p for p in heldout if normalise(p.body) not in bodies and normalise(p.summary) not in summaries]

    def shuffled(side: list[Pair]) -> list[Pair]:
        return sorted(side, key=lambda pair: (_hash(pair.module + pair.body), pair.body, pair.summary))

    return shuffled(train), shuffled(unseen)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def prompt_of(body: str) -> str:
    return body + PROMPT_SUFFIX


def write_datasets(directory: Path, train: Sequence[Pair], heldout: Sequence[Pair]) -> None:
    """``train.jsonl`` and ``heldout.jsonl`` for SFT, ``prompts.jsonl`` and ``heldout_prompts.jsonl`` for PPO."""
    directory.mkdir(parents=True, exist_ok=True)
    for sft_name, ppo_name, side in (("train", "prompts", train), ("heldout", "heldout_prompts", heldout)):
        both = [(prompt_of(pair.body), pair.summary) for pair in side]
        _write(directory / f"{sft_name}.jsonl", ({"prompt": p, "response": " " + s} for p, s in both))
        _write(directory / f"{ppo_name}.jsonl", ({"prompt": p, "reference": s} for p, s in both))


def _write(path: Path, records: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
