"""The forms that people's records have, what each becomes for every reader, and what is said of those that are none."""

from __future__ import annotations

import json
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nemo_rlhf.data.dialogues import read_dialogues
from nemo_rlhf.data.forms import FORMS, TEXTS, as_known, purpose_of
from nemo_rlhf.data.intake import MAX_NAMED, Intake
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.prompts import read_prompts
from nemo_rlhf.data.scores import read_scores
from nemo_rlhf.data.texts import read_texts
from tests.test_data import CHAT, make_tokenizer, read_one, write_lines


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def became(record: Any, purpose: Any, **how: Any) -> list[dict[str, Any]]:
    """What is left for the reader, without fields that say nothing of the text."""
    known = [one for _, one in Intake(**how).records([record], purpose)]
    kept = {*TEXTS, "reward", "tools", "chat_template_kwargs", "margin"}
    return [{name: value for name, value in one.items() if name in kept} for one in known]


A, B = user("a"), said("b")
PARTS = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
OPENAI_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"

SFT = {
    "TRL language modelling": ({"text": "a b"}, {"text": "a b"}),
    "TRL language modelling, chat": ({"messages": [A, B]}, {"messages": [A, B]}),
    "TRL prompt-completion": ({"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}),
    "TRL prompt-completion, chat": ({"prompt": [A], "completion": [B]}, {"messages": [A, B]}),
    "of parts": (
        {"prompt": [A], "completion": [said(PARTS)]},
        {"messages": [A, said(PARTS)]},
    ),
    "a completion of several turns": (
        {"prompt": [A], "completion": [said(None, tool_calls=[CALL]), {"role": "tool", "content": "1"}, B]},
        {"messages": [A, said(None, tool_calls=[CALL]), {"role": "tool", "content": "1"}, B]},
    ),
    "a completion with reasoning": (
        {"prompt": [A], "completion": [said("b", reasoning_content="because")]},
        {"messages": [A, said("b", reasoning_content="because")]},
    ),
    "of which only the completion is learned": (
        {"prompt": [A, B, A], "completion": [said("c", reasoning_content="d")]},
        {"messages": [A, said("b", weight=0), A, said("c", reasoning_content="d")]},
    ),
    "unpaired preference, the good one": (
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "response": "b"},
    ),
    "OpenAI chat with tools": (
        {"messages": [A, said(None, tool_calls=[OPENAI_CALL])], "tools": '[{"type": "function"}]'},
        {"messages": [A, said(None, tool_calls=[OPENAI_CALL])], "tools": '[{"type": "function"}]'},
    ),
    "OpenAI functions": (
        {"messages": [A, B], "functions": [{"name": "f"}]},
        {"messages": [A, B], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
    "OpenAI weights": (
        {"messages": [A, said("b", weight=0), user("c"), said("d", weight=1)]},
        {"messages": [A, said("b", weight=0), user("c"), said("d", weight=1)]},
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {"messages": [SYSTEM, A, B]},
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
            ]
        },
        {"messages": [A, said(None, tool_calls=[CALL])]},
    ),
    "conversations in roles": ({"conversations": [A, B]}, {"messages": [A, B]}),
    "NeMo-Aligner chat": (
        {
            "system": "s",
            "mask": "User",
            "type": None,
            "conversations": [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b", "label": None}],
        },
        {"messages": [SYSTEM, A, B]},
    ),
    "NeMo-Aligner, NeMo-RL, OpenRLHF": ({"input": "a", "output": "b"}, {"prompt": "a", "response": "b"}),
    "OpenRLHF chat": ({"input": [A], "output": "b"}, {"prompt": [A], "response": "b"}),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "response": "b"}),
    "Alpaca with input": ({"instruction": "a", "input": "c", "output": "b"}, {"prompt": "a\n\nc", "response": "b"}),
    "Alpaca with history": (
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
        {"prompt": [SYSTEM, A, B, user("c")], "response": "d"},
    ),
    "verl with thinking": (
        {"messages": [A, B], "enable_thinking": False},
        {"messages": [A, B], "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "UltraFeedback binarized": (
        {"prompt": "a", "messages": [A, B], "chosen": [A, B], "rejected": [A, said("c")]},
        {"messages": [A, B]},
    ),
    "turns": ({"turns": ["a", "b"]}, {"turns": ["a", "b"]}),
}

PAIRS = {
    "TRL explicit": (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2},
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2},
    ),
    "TRL explicit, chat": (
        {"prompt": [A], "chosen": [B], "rejected": [said("c")]},
        {"chosen": [A, B], "rejected": [A, said("c")]},
    ),
    "TRL implicit": ({"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a c"}),
    "TRL implicit, chat": (
        {"chosen": [A, B], "rejected": [A, said("c")]},
        {"chosen": [A, B], "rejected": [A, said("c")]},
    ),
    "hh-rlhf": ({"chosen": f"{HH} d", "rejected": f"{HH} e"}, {"prompt": HH, "chosen": " d", "rejected": " e"}),
    "hh-rlhf, earlier": (
        {"chosen": f"{HH} d", "rejected": "\n\nHuman: a\n\nAssistant: e"},
        {"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b\n\nHuman: c\n\nAssistant: d", "rejected": " e"},
    ),
    "UltraFeedback binarized": (
        {"prompt": "a", "messages": [A, B], "chosen": [A, B], "rejected": [A, said("c")], "score_chosen": 8.0},
        {"chosen": [A, B], "rejected": [A, said("c")]},
    ),
    "text prompt, replies as messages": (
        {"prompt": "a", "chosen": [B], "rejected": [said("c")]},
        {"chosen": [A, B], "rejected": [A, said("c")]},
    ),
    "a prompt in text that replies repeat in parts": (
        {"prompt": "bc", "chosen": [user(PARTS), B], "rejected": [user(PARTS), said("c")]},
        {"chosen": [user(PARTS), B], "rejected": [user(PARTS), said("c")]},
    ),
    "a prompt that the sides repeat": (
        {"prompt": [SYSTEM, A], "chosen": [SYSTEM, A, B], "rejected": [SYSTEM, A, said("c")]},
        {"chosen": [SYSTEM, A, B], "rejected": [SYSTEM, A, said("c")]},
    ),
    "tool calls": (
        {"prompt": [A], "chosen": [said(None, tool_calls=[OPENAI_CALL])], "rejected": [B], "tools": []},
        {"chosen": [A, said(None, tool_calls=[OPENAI_CALL])], "rejected": [A, B], "tools": []},
    ),
    "OpenAI": (
        {
            "input": {"messages": [A], "tools": [{"type": "function"}], "parallel_tool_calls": True},
            "preferred_output": [B],
            "non_preferred_output": [said("c")],
        },
        {"chosen": [A, B], "rejected": [A, said("c")], "tools": [{"type": "function"}]},
    ),
    "NeMo-RL": (
        {"context": [A], "completions": [{"rank": 1, "completion": [said("c")]}, {"rank": 0, "completion": [B]}]},
        {"chosen": [A, B], "rejected": [A, said("c")]},
    ),
    "NeMo-RL, ranks of pandas": (
        {"context": "a", "completions": [{"rank": 1.0, "completion": "c"}, {"rank": 0.0, "completion": "b"}]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ),
    "HelpSteer": (
        {"context": [A], "response1": "c", "response2": "b", "overall_preference": 2},
        {"prompt": [A], "chosen": "b", "rejected": "c"},
    ),
}

ULTRAFEEDBACK = {
    "instruction": "a",
    "completions": [{"response": text, "overall_score": score} for text, score in (("b", 3.0), ("c", 9.5), ("d", 3.0))],
}

SCORES = {
    "TRL unpaired, good": (
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "response": "b", "reward": 1.0},
    ),
    "TRL unpaired, bad, chat": (
        {"prompt": [A], "completion": [B], "label": False},
        {"messages": [A, B], "reward": 0.0},
    ),
    "TRL unpaired, bad, a number": (
        {"prompt": "a", "completion": "b", "label": 0},
        {"prompt": "a", "response": "b", "reward": 0.0},
    ),
    "NeMo-Aligner attribute": ({"text": "a", "label": [4]}, {"text": "a", "reward": 4}),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "reward": 1},
        {"messages": [A, B], "reward": 1},
    ),
}

PROMPTS = {
    "text": ({"prompt": "a", "answer": 1}, "a", {"answer": 1}),
    "verl": (
        {"prompt": [A], "reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"split": None}},
        [A],
        {"reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"split": None}},
    ),
    "SFT chat": ({"messages": [A, B], "n": 1}, [A], {"messages": [A, B], "n": 1}),
    "open chat": ({"messages": [A, B, user("c")], "n": 1}, [A, B, user("c")], {"n": 1}),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a"}]},
        [A],
        {"conversations": [{"from": "human", "value": "a"}]},
    ),
    "OpenRLHF": ({"input": "a", "label": "4"}, "a", {"label": "4"}),
    "input and output": ({"input": "a", "output": "4"}, "a", {"output": "4"}),
    "Alpaca": (
        {"instruction": "a", "input": "b", "output": "c"},
        "a\n\nb",
        {"instruction": "a", "input": "b", "output": "c"},
    ),
    "instruction": ({"instruction": "a"}, "a", {}),
    "UltraFeedback": (ULTRAFEEDBACK, "a", {"completions": ULTRAFEEDBACK["completions"]}),
    "implicit pair": (
        {"chosen": [A, B], "rejected": [A, said("c")]},
        [A],
        {"chosen": [A, B], "rejected": [A, said("c")]},
    ),
}


@pytest.fixture
def tokenizer() -> Any:
    made = make_tokenizer("<s> $A")
    # shows whatever is said beside the content, so that nothing is lost unseen
    made.chat_template = "{{ tools or '' }} {{ enable_thinking }}" + CHAT.replace(
        "{{ m.content }}", "{{ m.content or m.tool_calls }} {{ m.reasoning_content }}"
    )
    return made


@pytest.mark.parametrize("name", SFT)
def test_forms_to_learn_from(name: str, tokenizer: Any) -> None:
    record, expected = SFT[name]
    assert became(record, "sft") == [expected]
    assert read_one(record, tokenizer, 256) == read_one(expected, tokenizer, 256)
    assert purpose_of(record) == ("pairs" if "binarized" in name else "scores" if "label" in record else "sft")


@pytest.mark.parametrize("name", PAIRS)
def test_forms_of_pairs(name: str, tokenizer: Any) -> None:
    record, expected = PAIRS[name]
    assert became(record, "pairs") == [expected]
    assert read_pairs([record], tokenizer, 256) == read_pairs([expected], tokenizer, 256)
    assert purpose_of(record) == "pairs"


@pytest.mark.parametrize("name", SCORES)
def test_forms_with_scores(name: str, tokenizer: Any) -> None:
    record, expected = SCORES[name]
    for purpose in ("scores", "dialogues"):
        assert became(record, purpose) == [expected]
    assert read_scores([record], tokenizer, 64) == read_scores([expected], tokenizer, 64)
    (dialogue,) = read_dialogues([record], tokenizer, 64)
    assert sum(dialogue.rewards) == expected["reward"]


@pytest.mark.parametrize("name", PROMPTS)
def test_forms_of_prompts(name: str, tokenizer: Any) -> None:
    record, expected, metadata = PROMPTS[name]
    before = json.dumps(record)
    (prompt,) = read_prompts([record], tokenizer, 64)
    assert prompt == read_prompts([{**metadata, "prompt": expected}], tokenizer, 64)[0]
    assert prompt.metadata == metadata
    assert json.dumps(record) == before, "the user's own record stays what it was"


def test_completions_with_scores_and_ranks_make_pairs_of_better_and_worse(tokenizer: Any) -> None:
    pair = {"prompt": "a", "chosen": "c"}
    assert became(ULTRAFEEDBACK, "pairs") == [{**pair, "rejected": "b"}, {**pair, "rejected": "d"}]
    assert [one["reward"] for one in became(ULTRAFEEDBACK, "scores")] == [3.0, 9.5, 3.0]
    assert len(read_pairs([ULTRAFEEDBACK], tokenizer, 64)) == 2
    equal = {**ULTRAFEEDBACK, "completions": ULTRAFEEDBACK["completions"][::2]}
    with pytest.raises(ValueError, match="pair 0 has 2 completions of the same overall_score"):
        read_pairs([equal], tokenizer, 64)


@pytest.mark.parametrize(
    ("record", "purpose", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "sft", r"compares responses.*data.fields={response: chosen}"),
        ({"chosen": [A, B], "rejected": [A, A]}, "sft", r"compares responses.*data.fields={messages: chosen}"),
        (ULTRAFEEDBACK, "sft", r"compares responses \(UltraFeedback\)"),
        ({"prompt": "a", "completion": "b", "label": False}, "sft", "label false.*on_error=skip"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "sft", "is stepwise supervision, which no command"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "scores", "is stepwise supervision"),
        ({"input_ids": [1, 2]}, "sft", "is tokenised text"),
        ({"text": "a", "label": [4, 0, 1]}, "scores", r"3 values in \"label\".*data.fields={score: label.0}"),
        ({"question": "a", "answer": "b"}, "sft", r"data.fields={prompt: question, response: answer}"),
        ({"dialogue": [A, B]}, "sft", r"data.fields={messages: dialogue}"),
        ({"query": "a"}, "prompts", r"data.fields={prompt: query}"),
        ({"prompt": "a", "winner": "b", "loser": "c"}, "pairs", r"data.fields={chosen: winner, rejected: loser}"),
        ({"prompt": "a", "response": "b"}, "pairs", r'no field "chosen" and "rejected"'),
        ({"messages": [A, B], "score": 1}, "pairs", "is a scored response"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "sft", "message 0 is from 'narrator'"),
        ({"conversations": [{"from": "human", "value": "a"}], "mask": "Assistant"}, "sft", '"mask": \'Assistant\''),
        (
            {"conversations": [{"from": "User", "value": "a"}, {"from": "Assistant", "value": "b", "label": "q:4"}]},
            "sft",
            "message 1 has a \"label\"",
        ),
        ({"messages": [B]}, "prompts", "no turn but the assistant's"),
        ({"chosen": "a b", "rejected": "a c"}, "prompts", "do not say where their prompt ends"),
        ({"chosen": [A, B], "rejected": [A, B]}, "pairs", "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": [A, B], "rejected": "b"}, "pairs", "chosen and rejected are the same"),
        ({"context": [A], "response1": "b", "response2": "c", "overall_preference": 0}, "pairs", "the preference 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_told_what_would_help(record: Any, purpose: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        became(record, purpose)
    assert "\n" not in str(caught.value)


def test_every_form_has_a_test() -> None:
    records = [*(one[0] for table in (SFT, PAIRS, SCORES, PROMPTS) for one in table.values()), ULTRAFEEDBACK]
    records += [{"prompt": "a", "completions": ["b"], "labels": [True]}, {"input_ids": [1]}]
    records += [{"conversation": [A, B]}, {"prompt": "a", "response": "b"}]
    assert [form.name for form in FORMS if not any(form.matches(record) for record in records)] == []


def test_the_documented_records_are_of_the_forms_that_they_are_given_for() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| ([^|`]+?) \| `(\{.*?\})` \| (.*) \|$", page, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(dict.fromkeys(form.name for form in FORMS if form.serves))
    everything = "the same"
    for name, text, uses in rows:
        everything = uses if uses != "the same" else everything
        for purpose in ("sft", "prompts", "pairs", "scores", "dialogues"):
            if purpose in re.findall(r"\w+", everything):
                assert as_known("", json.loads(text), purpose)[0] in (name, "prompt", "text"), (name, purpose)
            elif (name, purpose) != ("text", "pairs"):
                assert not any(form.name == name and purpose in form.serves for form in FORMS), (name, purpose)


# ---- names of one's own, and what becomes of bad records


def test_fields_are_named_by_the_user(tokenizer: Any) -> None:
    record = {"question": "a", "extra_info": {"answer": "b", "tries": ["c", "d"]}, "prompt": "j"}
    fields = {"prompt": "question", "response": "extra_info.answer"}
    assert became(record, "sft", fields=fields) == [{"prompt": "a", "response": "b"}]
    assert became(record, "sft", fields={"prompt": "extra_info.tries.1", "response": "prompt"}) == [
        {"prompt": "d", "response": "j"}
    ]
    pair = {"prompt": "a", "chosen": [A, B], "rejected": [A, said("c")]}
    assert became(pair, "sft", fields={"response": "chosen"}) == [{"messages": [A, B]}]
    assert became({"text": "a", "label": [4, 0]}, "scores", fields={"score": "label.1"})[0]["text"] == "a"
    (prompt,) = read_prompts(
        [record], tokenizer, 8, intake=Intake({"prompt": "question", "answer": "extra_info.answer"})
    )
    assert (prompt.text, prompt.metadata["answer"], "question" in prompt.metadata) == ("a", "b", False)
    with pytest.raises(ValueError, match=r"data.fields={prompt: qestion} names what no record of the list has"):
        read_texts([record, {"prompt": "a"}], tokenizer, 8, "response", intake=Intake({"prompt": "qestion"}))
    # for prompts, names of a run's other files are no mistake
    assert read_prompts(["a"], tokenizer, 8, intake=Intake({"reward": "points"}))[0].text == "a"


READERS: dict[str, Any] = {
    "sft": (partial(read_texts, train_on="response"), {"prompt": "a", "response": "b"}),
    "prompts": (read_prompts, {"prompt": "a"}),
    "pairs": (read_pairs, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    "scores": (read_scores, {"prompt": "a", "response": "b", "score": 1}),
    "dialogues": (read_dialogues, {"prompt": "a", "response": "b", "reward": 1}),
}


@pytest.mark.parametrize("purpose", READERS)
def test_all_bad_records_are_named_at_once_or_left_out(purpose: str, tmp_path: Path, tokenizer: Any) -> None:
    read, good = READERS[purpose]
    empty = {**good, next(name for name in ("response", "chosen", "prompt") if name in good): ""}
    path = write_lines(tmp_path / "some.jsonl", good, "{broken", good, empty, "", {"x": 1}, good)
    intake = Intake()
    with pytest.raises(ValueError, match=r"^3 of 6 \w+( \w+)? of .*some.jsonl cannot be used") as caught:
        read(path, tokenizer, 64, intake=intake)
    told = str(caught.value)
    assert [f"line {number} " in told or f"line {number}:" in told for number in range(1, 8)] == [
        number in (2, 4, 6) for number in range(1, 8)
    ]
    skipping = Intake(on_error="skip")
    with pytest.warns(UserWarning, match=r"3 of 6 .* are left out") as warned:
        assert len(read(path, tokenizer, 64, intake=skipping)) == 3
    assert len(warned) == 1 and len(skipping.refused) == 3


def test_two_equal_answers_are_one_bad_record_of_many(tmp_path: Path, tokenizer: Any) -> None:
    good, bad = {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}
    # texts that differ, and are the same tokens
    same = {"prompt": "a", "chosen": "b c", "rejected": "b  c"}
    path = write_lines(tmp_path / "pairs.jsonl", *[good, bad, same] * 15)
    with pytest.raises(ValueError, match="30 of 45 pairs") as caught:
        read_pairs(path, tokenizer, 64)
    assert str(caught.value).count("are the same text") == MAX_NAMED
    assert str(caught.value).endswith("and 10 more")
    with pytest.warns(UserWarning, match="30 of 45 pairs"):
        assert len(read_pairs(path, tokenizer, 64, intake=Intake(on_error="skip"))) == 15
    with pytest.raises(ValueError, match=r"2 of 2 pairs .* cannot be used, so that none is left"):
        read_pairs([bad, same], tokenizer, 64, intake=Intake(on_error="skip"))


def test_halves_of_pairs_are_never_put_together_anew(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "halves.jsonl", {"text": "a"}, "{broken", {"text": "c"}, {"text": "d"})
    with pytest.raises(ValueError, match="which belong together is not known"):
        read_pairs(path, tokenizer, 64, intake=Intake(on_error="skip"))


def test_rewards_stay_with_their_samples_when_others_are_left_out(tokenizer: Any) -> None:
    samples = ["a b", "", ["a", "c"], {"prompt": "a", "response": "d", "reward": 9}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_dialogues(samples, tokenizer, 64, rewards=[1, 2, [3], 4], intake=Intake(on_error="skip"))
    assert [sum(dialogue.rewards) for dialogue in found] == [1, 3, 4]


def test_only_the_best_of_those_that_can_be_used(tokenizer: Any) -> None:
    records = [{"prompt": "a", "response": "b" if reward else "", "reward": reward} for reward in range(5)]
    with pytest.warns(UserWarning, match="1 of 5 texts"):
        texts = read_texts(records, tokenizer, 64, "response", top_percent=50, intake=Intake(on_error="skip"))
    assert len(texts) == 2
