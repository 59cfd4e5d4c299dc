"""Whatever a file of records holds, a reader takes it or says in one sentence where it is wrong."""

from __future__ import annotations

import json
import warnings
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemo_rlhf.cli.data import run_data
from nemo_rlhf.config.data import DataCommandConfig
from nemo_rlhf.data.dialogues import read_dialogues
from nemo_rlhf.data.forms import FORMS
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.prompts import read_prompts
from nemo_rlhf.data.scores import read_scores
from nemo_rlhf.data.texts import read_texts
from tests.test_data import CHAT, make_tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

TOKENIZER = make_tokenizer("<s> $A")
TOKENIZER.chat_template = CHAT
READERS: dict[str, Any] = {
    "sft": partial(read_texts, train_on="response"),
    "prompts": read_prompts,
    "pairs": read_pairs,
    "scores": read_scores,
    "dialogues": read_dialogues,
}
BOUNDED = hypothesis.settings(max_examples=150, derandomize=True, deadline=None, database=None)

FIELDS = [
    *sorted({name for form in FORMS for name in form.fields}),
    *("score", "reward", "rewards", "margin", "done", "tools", "system", "mask", "history", "chat_template_kwargs"),
    *("response", "functions", "enable_thinking", "question"),
]
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "", None, 1])
TEXTS = st.one_of(
    st.sampled_from(["a", "b c", "", " ", "\n\nHuman: a\n\nAssistant: b", "{}", "\ud83d", "\x00"]), st.text()
)
SCALARS = st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats(), st.just(10**400))
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "label"]),
        st.one_of(
            ROLES, SCALARS, st.lists(st.dictionaries(st.sampled_from(["type", "text", "function"]), TEXTS), max_size=2)
        ),
        max_size=4,
    )
    | st.fixed_dictionaries({"role": ROLES, "content": TEXTS})
    | st.fixed_dictionaries({"from": ROLES, "value": TEXTS}),
    max_size=4,
)
COMPLETIONS = st.lists(
    st.dictionaries(
        st.sampled_from(["rank", "completion", "response", "overall_score"]), SCALARS | MESSAGES, max_size=3
    ),
    max_size=3,
)
VALUES = st.recursive(
    st.one_of(SCALARS, MESSAGES, COMPLETIONS),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["messages", "tools", "x"]), inner, max_size=2)
    ),
    max_leaves=6,
)
RECORDS = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5),
    # all that a form must have, and something else
    st.sampled_from(FORMS).flatmap(
        lambda form: st.fixed_dictionaries(
            dict.fromkeys(form.fields, VALUES), optional={"score": VALUES, "tools": VALUES}
        )
    ),
)


def check(source: Any, purpose: str, num_records: int | None) -> None:
    """Every record is taken, or refused in a sentence that names its place; as training finds it, and as the command
    that shows a file does."""
    intake = Intake(on_error="note")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            taken = READERS[purpose](source, TOKENIZER, 64, intake=intake)
        except ValueError as error:
            assert "\n" not in str(error) and str(error)
            taken = []
        assert all("\n" not in sentence and sentence for sentence in intake.refused)
        if isinstance(source, list):
            assert all(any(f" {index}" in sentence for index in range(len(source))) for sentence in intake.refused)
        if num_records and purpose in ("sft", "prompts"):
            assert len(taken) + len(intake.refused) == num_records, "in silence"
        if isinstance(source, list):
            return
        shown = StringIO()
        try:
            code = run_data(str(source), DataCommandConfig(), purpose, Console(file=shown))  # type: ignore[arg-type]
        except ValueError as error:
            assert "\n" not in str(error) and str(error)
        else:
            assert code in (0, 2) and shown.getvalue()
            assert "\x1b" not in shown.getvalue() and "\x00" not in shown.getvalue()


@pytest.mark.parametrize("purpose", READERS)
@BOUNDED
@hypothesis.given(records=st.lists(RECORDS, min_size=1, max_size=3))
def test_any_record_is_taken_or_named(purpose: str, records: list[Any]) -> None:
    check(records, purpose, len(records))


@BOUNDED
@hypothesis.given(
    purpose=st.sampled_from(sorted(READERS)), records=st.lists(RECORDS, max_size=4), layout=st.integers(0, 4)
)
def test_any_json_is_taken_or_named(tmp_path_factory: Any, purpose: str, records: list[Any], layout: int) -> None:
    texts = [json.dumps(record) for record in records]
    whole = [
        "\n".join(texts),
        json.dumps(records),
        json.dumps(records, indent=1),
        ",\n".join(texts),
        json.dumps({"a": records}),
    ]
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "file.json"
    path.write_text(whole[layout])
    check(path, purpose, None)


@BOUNDED
@hypothesis.given(
    purpose=st.sampled_from(sorted(READERS)),
    head=st.sampled_from(
        [
            b"",
            b"\x1f\x8b",
            b"\x1f\x8b\x08\x00",
            b"PAR1",
            b"\x28\xb5\x2f\xfd",
            b"BZh9",
            b"\xfd7zXZ\x00",
            b"[",
            b'{"a":',
            b"\xef\xbb\xbf",
        ]
    ),
    body=st.one_of(
        st.binary(max_size=200),
        st.lists(
            st.sampled_from([b"{", b"}", b"[", b"]", b'"prompt"', b":", b",", b"\n", b'"a"', b"1", b"\xff"]),
            max_size=30,
        ).map(b"".join),
    ),
    name=st.sampled_from(["file.jsonl", "file.json", "file.csv", "file.gz", "file.parquet", "file"]),
)
def test_any_bytes_are_taken_or_named(tmp_path_factory: Any, purpose: str, head: bytes, body: bytes, name: str) -> None:
    path: Path = tmp_path_factory.mktemp("fuzz", numbered=True) / name
    path.write_bytes(head + body)
    check(path, purpose, None)
