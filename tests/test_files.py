"""Files that records come in: compressed, in columns, in one piece, of other encodings, damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_rlhf.data.files import read_records
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.prompts import read_prompts
from nemo_rlhf.data.scores import read_scores
from nemo_rlhf.data.texts import read_texts
from tests.test_data import CHAT, make_tokenizer, write_lines

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

RECORDS = [{"prompt": "a b", "answer": 3}, {"prompt": "c", "answer": 4}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


def read(source: Any) -> list[Any]:
    return [dict(record) if isinstance(record, dict) else record for _, record in read_records(source, "prompt")]


PIECES = {
    "lines.jsonl": LINES,
    "lines without an end.jsonl": LINES.rstrip(),
    "lines.json": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": LINES.replace(b"\n", b"\r\n"),
    "list.json": json.dumps(RECORDS).encode(),
    "list.jsonl": json.dumps(RECORDS).encode(),
    "written well.json": json.dumps(RECORDS, indent=2).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=2).encode(),
    "one a line.json": b"[\n" + b",\n".join(LINES.splitlines()) + b"\n]\n",
    "beside the bracket.json": b"[" + b",\n".join(LINES.splitlines()) + b"]",
    "held.json": json.dumps({"version": 1, "data": RECORDS}).encode(),
    "held well.json": json.dumps({"version": 1, "data": RECORDS}, indent=1).encode(),
    "lines.jsonl.gz": gzip.compress(LINES),
    "two members.gz": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "lines.jsonl.zst": zstd(LINES),
    "two frames.jsonl.zst": zstd(LINES[:20]) + zstd(LINES[20:]),
    "lines.bz2": bz2.compress(LINES),
    "lines.xz": lzma.compress(LINES),
    "list.json.gz": gzip.compress(json.dumps(RECORDS, indent=2).encode()),
    "gzip by another name.jsonl": gzip.compress(LINES),
    "lines by another name.csv": LINES,
}


@pytest.mark.parametrize("name", PIECES)
def test_what_a_file_is_its_bytes_say(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PIECES[name])
    assert read(tmp_path / name) == RECORDS
    assert read(str(tmp_path / name)) == RECORDS


def test_an_object_that_is_a_record_is_one(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for text in (json.dumps(chat), json.dumps(chat, indent=2)):
        (tmp_path / "chat.json").write_text(text)
        assert read(tmp_path / "chat.json") == [chat]
    dialogues = write_lines(tmp_path / "dialogues.jsonl", ["a", "b"], ["c", "d"])
    assert read(dialogues) == [["a", "b"], ["c", "d"]]
    assert read(write_lines(tmp_path / "one.jsonl", ["a", "b"])) == [["a", "b"]]
    assert read(write_lines(tmp_path / "strings.json", ["a", "b"])) == ["a", "b"]


def test_lines_of_lists_are_told(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('\n[\n{"prompt":\n"a"},\n\n\n{"prompt": "b"}]')
    assert [where.rpartition(", ")[2] for where, _ in read_records(tmp_path / "list.json", "prompt")] == [
        "line 3",
        "line 7",
    ]
    (tmp_path / "list.json").write_text('[\n {"prompt": "a"},\n {"prompt": }\n]')
    with pytest.raises(ValueError, match=r"list.json, from line 1 on, is not JSON \(.*line 3 column"):
        read(tmp_path / "list.json")


def test_columns(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "b", compression="zstd")
    (tmp_path / "a.csv").write_text('prompt,answer\n"a b",3\nc,4\n')
    (tmp_path / "a.tsv").write_text("prompt\tanswer\na b\t3\n\nc\t4\n")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert read(tmp_path / "a.parquet") == RECORDS
    assert read(tmp_path / "b") == RECORDS
    in_text = [{"prompt": "a b", "answer": "3"}, {"prompt": "c", "answer": "4"}]
    assert [read(tmp_path / name) for name in ("a.csv", "a.tsv", "a.csv.gz")] == [in_text] * 3


def test_cells_are_text_but_for_scores(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    (tmp_path / "a.csv").write_text('prompt,completion,score,id\n"a\nb",c,0.5,007\nd,"[""e""]",1e3,008\n')
    records = [record for _, record in Intake().records(tmp_path / "a.csv", "scores")]
    assert [(one["response"], one["score"], one["id"]) for one in records] == [
        ("c", 0.5, "007"),
        ('["e"]', 1000.0, "008"),
    ]
    assert [text.score for text in read_scores(tmp_path / "a.csv", tokenizer, 16)] == [0.5, 1000.0]
    (tmp_path / "b.csv").write_text("prompt,completion,label\na,b,True\na,c,false\n")
    assert [text.score for text in read_scores(tmp_path / "b.csv", tokenizer, 16)] == [1.0, 0.0]
    (tmp_path / "c.csv").write_text("prompt,chosen,rejected,margin\na,b,c,\na,b,c,2\n")
    assert [pair.margin for pair in read_pairs(tmp_path / "c.csv", tokenizer, 16)] == [0.0, 2.0]
    (tmp_path / "d.csv").write_text("prompt,response,score\na,b,good\na,b\n,b,1\na,b,1,2\n")
    with pytest.raises(ValueError, match="3 of 4 scored texts") as caught:
        read_scores(tmp_path / "d.csv", tokenizer, 16)
    assert "line 2: the reward 'good'" in str(caught.value) and "line 3 has 2 cells" in str(caught.value)
    assert "line 5 has 4 cells" in str(caught.value)
    for header in ("a,a\n1,2\n", "a,\n1,2\n"):
        (tmp_path / "e.csv").write_text(header)
        with pytest.raises(ValueError, match="line 1 must give each column"):
            read(tmp_path / "e.csv")


def test_patterns_and_directories(tmp_path: Path) -> None:
    for name in ("part-2.jsonl", "part-1.jsonl"):
        write_lines(tmp_path / name, {"prompt": name})
    assert [one["prompt"] for one in read(str(tmp_path / "part-*.jsonl"))] == ["part-1.jsonl", "part-2.jsonl"]
    (tmp_path / "a[1].jsonl").write_bytes(LINES)
    assert read(str(tmp_path / "a[1].jsonl")) == RECORDS, "a name is a name before it is a pattern"
    with pytest.raises(ValueError, match="There is no file"):
        read(str(tmp_path / "nothing-*.jsonl"))
    data = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "only"))
    assert read(tmp_path / "only") == read(tmp_path / "only" / "train") == RECORDS
    (tmp_path / "only" / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as a data set"):
        read(tmp_path / "only" / "train")


def test_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        asked.append((name, config, split))
        data = datasets.Dataset.from_list(RECORDS)
        return data if split else datasets.DatasetDict({"test": data.select([]), "train": data})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name.v1.2:test", "owner/name/main:train[:10%]"):
        assert read(source) == RECORDS
    assert asked == [
        ("owner/name", None, None),
        ("owner/name.v1.2", None, "test"),
        ("owner/name", "main", "train[:10%]"),
    ]
    (tmp_path / "owner").mkdir()
    for path in ("data/train.jsonl", "owner/name", "/owner/name", "a/b/c/d", "name"):
        with pytest.raises(ValueError, match="There is no file"):
            read(path)
    assert len(asked) == 3

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"no file x/y .* from the hub \(no route\)"):
        read("x/y")


# ---- what cannot be read


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("cut.gz", gzip.compress(LINES * 50)[:-20], "cannot be unpacked .* damaged, or was cut off"),
        ("cut.zst", zstd(LINES * 50)[:-10], "cannot be unpacked .* damaged, or was cut off"),
        ("cut.xz", lzma.compress(LINES * 50)[:-20], "cannot be unpacked"),
        ("bad.bz2", bz2.compress(LINES)[:10] + b"xxxxxxxxxxxxxxxxxxxxx", "cannot be unpacked"),
        ("bad.gz", gzip.compress(LINES)[:12] + b"xxxxxxxxxxxxxxxxxxxxx", "cannot be unpacked"),
        ("cut.parquet", b"PAR1 and no more", "is no parquet file that can be read"),
        ("utf-16.jsonl", LINES.decode().encode("utf-16"), "is text in UTF-16: save it in UTF-8"),
        ("packed.gz", gzip.compress(LINES.decode().encode("utf-16")), "is text in UTF-16"),
        ("archive.jsonl", b"PK\x03\x04rest", "is a zip archive"),
        ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "only a git-LFS pointer"),
        ("nothing.gz", gzip.compress(b""), "is empty: it must hold at least one prompt"),
        ("header.csv", b"prompt,answer\n", "is empty: it must hold at least one prompt"),
        ("quotes.csv", b'prompt\n"a"b\n', "line 2 is no row of a csv file"),
        ("latin.csv", b"prompt\n\xe9\n", "line 2 has text that is no Unicode"),
        ("latin.jsonl", b'{"prompt": "\xe9"}\n', "line 1 is not UTF-8"),
        ("surrogate.jsonl", b'{"prompt": "nice \\ud83d"}\n', r"line 1 has text that is no Unicode \('\\ud83d' after 5"),
        ("key.jsonl", b'{"prompt": "a", "x": {"\\udc00": 1}}\n', "line 1 has text that is no Unicode"),
        ("encoded.jsonl", b'{"prompt": "\xed\xa0\xbd"}\n', "line 1 is not UTF-8"),
        ("deep.jsonl", b'{"prompt": "a"}\n{"prompt": ' + b"[" * 10**6, "line 2 is JSON that is nested too deeply"),
        ("deep too.jsonl", b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}", "line 1 has more than 100 lists"),
        ("deep.json", b"[" * 10**6 + b"\n" + b"[" * 10, "nested too deeply"),
        ("twice.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1 names 'prompt' twice"),
    ],
)
def test_damage_is_one_sentence(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(tmp_path / name, make_tokenizer(), 64)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_text_that_json_can_write_and_text_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    text = "a\x00b\u2028c\r\n\U0001f600d"
    path.write_bytes(
        json.dumps({"prompt": text}).encode() + b"\n" + json.dumps({"prompt": text}, ensure_ascii=False).encode()
    )
    assert [one["prompt"] for one in read(path)] == [text, text]
    for wrong in ("\ud83d", {"prompt": "a", "more": [["\udc00"]]}):
        with pytest.raises(ValueError, match="prompt 1 has text that is no Unicode"):
            read_prompts(["a", wrong], make_tokenizer(), 8)


@pytest.mark.skipif(sys.platform == "win32", reason="needs modes")
def test_a_name_that_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read(str(tmp_path / ("a" * 5000)))


def test_nulls_that_arrow_adds_are_not_the_users(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Bonn"}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"x": 1}}}
    records = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "tool_calls": [one]},
                {"role": "tool", "name": "f", "content": "b"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {name: {"type": "string"}}}}],
            "extra_info": {"city": None, "x": 1},
        }
        for one, name in ((call, "city"), (other, "x"))
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "tools.parquet")
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "tools"))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content or m.tool_calls }}")
    for source in (tmp_path / "tools.parquet", tmp_path / "tools"):
        assert [record for _, record in Intake().records(source, "sft")] == records
        assert read_texts(source, tokenizer, 64, "response") == read_texts(records, tokenizer, 64, "response")
        (first, _) = read_prompts(source, tokenizer, 64)
        assert first.metadata["extra_info"] == {"city": None, "x": 1}
    # a null that is written in JSON was meant
    tool = {"type": "function", "function": {"parameters": {"x": {"default": None}}}}
    path = write_lines(tmp_path / "tools.jsonl", {**records[0], "tools": [tool]})
    assert next(record for _, record in Intake().records(path, "sft"))["tools"] == [tool]
