"""``nemo-rlhf data``: what it says of a file, in characters and in tokens, and its exit codes."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nemo_rlhf.cli import main
from nemo_rlhf.cli.data import LEARNED, run_data
from nemo_rlhf.config import load
from tests.test_data import CHAT, make_tokenizer, write_lines

CHATS = [
    {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "d e f"}]},
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    made = make_tokenizer("<s> $A")
    made.chat_template = CHAT
    made.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def shown(file: Path | str, *overrides: str, purpose: Any = None) -> tuple[int, str]:
    text = StringIO()
    code = run_data(str(file), load("data", overrides), purpose, Console(file=text, width=200))
    return code, text.getvalue()


def test_forms_lengths_and_the_first_record(tmp_path: Path, tokenizer: str) -> None:
    path = write_lines(tmp_path / "chats.jsonl", *CHATS)
    code, text = shown(path)
    assert code == 0
    assert "read for sft" in text and "1 of the form: chat messages\n  1 of the form: ShareGPT chat" in text
    assert "Without a tokenizer lengths are in characters" in text
    assert "user: a b\nassistant: ⟦c⟧" in text
    code, text = shown(path, f"model.tokenizer={tokenizer}")
    assert code == 0 and "Without a tokenizer" not in text
    assert "⟦c </s>⟧" in text and "<|user|> a b <|assistant|>" in text
    assert "tokens of 2 prompts: 3 to 4, half of them up to 4, 7 in all" in text
    assert "tokens of 2 whole texts: 6 to 7, half of them up to 7, 13 in all" in text
    bar = "█" * 40
    assert f"  6  {bar} 1\n  7  {bar} 1\n" in text
    assert shown(path, f"model.tokenizer={tokenizer}", "data.train_on=all")[1].count("⟦a b <|assistant|>") == 1


@pytest.mark.parametrize(
    ("record", "purpose", "marked"),
    [
        ({"prompt": "a", "answer": 1}, "prompts", ["a\n"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs", ["a⟦b⟧", "a⟦c⟧"]),
        ({"prompt": "a", "response": "b", "score": 1}, "scores", ["a⟦b⟧"]),
        ({"turns": ["a", "b", "c", "d"], "rewards": [1, 2]}, "dialogues", ["a⟦b⟧c⟦d⟧"]),
        (["a", "b"], "sft", ["a⟦b⟧"]),
        ('"a b"', "sft", ["⟦a b⟧"]),
        ({"text": "a b"}, "sft", ["⟦a b⟧"]),
    ],
)
def test_every_reader_is_guessed_and_marks_what_it_learns(
    record: Any, purpose: str, marked: list[str], tmp_path: Path, tokenizer: str
) -> None:
    path = write_lines(tmp_path / "some.jsonl", record)
    code, text = shown(path)
    assert (code, f"read for {purpose} (so its first record says" in text) == (0, True)
    assert all(piece in text for piece in marked)
    code, with_tokens = shown(path, f"model.restore_from={tokenizer}", purpose=purpose)
    assert (code, f"read for {purpose}:" in with_tokens) == (0, True)
    assert ("⟦" in with_tokens) == ("⟦" in text)


def test_all_that_would_be_refused_is_told(tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [{"prompt": "a", "response": ""}, "{broken", {"question": "a"}] * 10
    path = write_lines(tmp_path / "sft.jsonl", {"prompt": "a", "response": "b"}, *bad)
    for overrides in ([], [f"model.tokenizer={tokenizer}"]):
        code, text = shown(path, *overrides)
        assert code == 2 and "30 would be refused:" in text
        assert [f", line {number} " in text or f", line {number}:" in text for number in range(1, 32)] == [
            False,
            *[True] * 30,
        ]
        assert shown(path, *overrides, "data.on_error=skip")[0] == 0
    only_bad = write_lines(tmp_path / "bad.jsonl", *bad)
    for overrides in ([], [f"model.tokenizer={tokenizer}"]):
        code, text = shown(only_bad, *overrides, purpose="pairs")
        assert code == 2 and "30 would be refused:" in text and "No pair is left" not in text
    # what only a tokenizer finds
    long = write_lines(tmp_path / "long.jsonl", {"prompt": "a b c"}, {"prompt": "d"})
    assert shown(long)[0] == 0
    code, text = shown(long, f"model.tokenizer={tokenizer}", "data.max_prompt_length=3")
    assert code == 2 and "line 1: the prompt is 4 tokens long" in text
    assert main(["data", str(path), "data.fields={response: question}", "--for", "sft"]) == 2
    assert "21 would be refused" not in capsys.readouterr().out
    assert main(["data", str(tmp_path / "nowhere.jsonl")]) == 2
    assert "There is no file" in capsys.readouterr().err
    assert main(["data", str(path), "data.on_eror=skip"]) == 2
    assert "did you mean data.on_error" in capsys.readouterr().err


def test_colour_on_a_terminal_and_nothing_that_steers_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "odd.jsonl", {"prompt": "a\x1b[31m [red]", "response": "b\rc"})
    text = StringIO()
    run_data(str(path), load("data", []), None, Console(file=text, force_terminal=True, color_system="standard"))
    assert "\x1b[31m" not in text.getvalue() and r"a\x1b[31m [red]" in text.getvalue()
    assert "\x1b[1;32m⟦b\\rc⟧" in text.getvalue() and LEARNED == "bold green"


def test_without_a_tokenizer_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "chats.jsonl", *CHATS)
    code = (
        "import sys; from nemo_rlhf.cli import main; code = main(['data', sys.argv[1]]); "
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
