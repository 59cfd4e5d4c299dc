"""The import of comparisons, given anything: each record is taken or named with its line, and there is no traceback."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra feedback")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nemo_rlhf.cli import main
from nemo_rlhf.feedback.store import Store, run_name

bounded = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

texts = st.one_of(st.sampled_from(["", "a", "b", "yes", "no\n", "é\u202e\x00", "x" * 201]), st.text(max_size=20))
numbers = st.one_of(
    st.integers(), st.floats(), st.sampled_from([-1, 2**31, -(2**31) - 1, 2**63, 10**30, 10**400, 1e308, -0.0])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts, st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", 1]), "content": st.one_of(texts, values)}
    ),
    max_size=3,
)
OTHERS = {
    "key": texts, "step": numbers, "annotator": texts, "simulated": st.booleans(), "seconds": numbers, "note": texts,
    "margin": numbers, "messages": messages,
}  # fmt: skip
plain = st.fixed_dictionaries(
    {"prompt": texts, "chosen": texts, "rejected": texts},
    optional={name: st.one_of(kind, st.none()) for name, kind in OTHERS.items()},
)
odd = st.one_of(
    values,
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", *OTHERS]), st.one_of(values, messages)),
)
records = st.lists(st.one_of(plain, plain, plain, odd), min_size=1, max_size=4)


class Imports:
    """A run into which files are imported one after the other."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory, self._capsys = directory, capsys
        self.store = Store.open(str(directory / "feedback.db"))
        self.run_id = self.store.run(run_name(directory), create=True)

    def take(self, name: str, content: bytes) -> int | str:
        """How many records were taken, or what was said instead; nothing is in the store then."""
        file = self.directory / name
        file.write_bytes(content)
        before = self.store.comparison_ids(self.run_id)
        where = ["--store", str(self.directory / "feedback.db"), "--run", str(self.directory)]
        code = main(["feedback", "import", *where, str(file)])
        said = self._capsys.readouterr()
        if code == 0:
            assert not said.err
            return sum(map(int, re.findall(r"\d+", said.out)))
        (line,) = said.err.splitlines()
        assert code == 2 and line.startswith("nemo-rlhf: error: ") and str(file) in line and len(line) < 2000
        assert self.store.comparison_ids(self.run_id) == before
        return line


@pytest.fixture
def imports(tmp_path: Path, capsys: pytest.CaptureFixture[str], outside_of_any_job: None) -> Iterator[Imports]:
    made = Imports(tmp_path, capsys)
    yield made
    made.store.close()


def check(outcome: int | str, num_lines: int, num_records: int) -> None:
    if isinstance(outcome, int):
        assert outcome == num_records
    else:
        found = re.search(r", line (\d+)", outcome)
        assert found and 1 <= int(found[1]) <= num_lines, outcome


@bounded
@given(given=records, is_ascii=st.booleans())
@example(given=[{"prompt": "p", "chosen": "a", "rejected": "b", "step": 10**30}], is_ascii=True)
@example(given=[{"prompt": "p", "chosen": "a", "rejected": "b", "seconds": 10**400}], is_ascii=True)
@example(given=[{"prompt": "p", "chosen": "a", "rejected": "b", "margin": float("inf")}], is_ascii=True)
@example(given=[{"prompt": "p", "chosen": "a", "rejected": "b", "note": "\ud800"}], is_ascii=True)
@example(given=[{"prompt": "p", "chosen": "a", "rejected": "b", "step": ["x" * 10_000]}], is_ascii=True)
def test_lines_of_json(given: list[Any], is_ascii: bool, imports: Imports) -> None:
    lines = [json.dumps(record, ensure_ascii=is_ascii) for record in given]
    check(imports.take("pairs.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass")), len(lines), len(lines))


COLUMNS = ["prompt", "chosen", "rejected", *OTHERS]
cells = st.one_of(texts, st.sampled_from(["1", "-1", "0.5", "true", '"', "a,b", "[]"]))


@bounded
@given(
    header=st.one_of(st.just(COLUMNS[:3]), st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=6)),
    given=st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=4),
    more=st.lists(cells, max_size=3),
)
def test_tables(header: list[str], given: list[list[str]], more: list[str], imports: Imports) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *(row + more[: len(header) - 3] for row in given)])
    outcome = imports.take("pairs.csv", text.getvalue().encode("utf-8", "surrogatepass"))
    check(outcome, text.getvalue().count("\n") + 1, len(given))


@bounded
@given(given=st.lists(plain, min_size=1, max_size=3), junk=st.binary(max_size=40), place=st.integers(0, 10_000))
def test_damaged_lines(given: list[Any], junk: bytes, place: int, imports: Imports) -> None:
    """Bytes that were put anywhere, and a file that ends anywhere."""
    data = "\n".join(json.dumps(record) for record in given).encode()
    place %= len(data) + 1
    for content in (data[:place] + junk + data[place:], data[:place]):
        outcome = imports.take("pairs.jsonl", content)
        if isinstance(outcome, int):
            assert outcome == sum(bool(line.strip()) for line in content.split(b"\n"))


def test_nothing_else_is_a_file_of_pairs(imports: Imports) -> None:
    brackets, magic = b"[" * 100_000, (b"\xff\xfe\x00", b"\x1f\x8b\x08", b"PAR1")
    for content in (b"", b"\n \n", brackets, *magic, b"\0" * 50, b'"' * 99, b"null"):
        assert isinstance(imports.take("pairs.jsonl", content), str)
