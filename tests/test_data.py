"""Records to tokenised prompts and texts, their order, and their batches; and the message for every wrong record."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from nemo_rlhf.data.batches import pad_samples, pad_texts, pad_tokens
from nemo_rlhf.data.order import Order, Stream
from nemo_rlhf.data.prompts import read_prompts
from nemo_rlhf.data.texts import read_texts
from nemo_rlhf.data.tokenizer import fingerprint, load_tokenizer
from nemo_rlhf.types import Prompt, Sample, Text

transformers = pytest.importorskip("transformers")

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", *"abcdefghij"]
BOS, EOS, PAD, USER, ASSISTANT = 1, 2, 3, 4, 5
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% if m.role == 'assistant' %}</s> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<|{{ m.role }}|> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> "
    "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def make_tokenizer(post: str | None = None, words: list[str] = WORDS, **special: Any) -> Any:
    """One token a letter, split at blanks; ``post`` is what is put around a text, as "<s> $A </s>"."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    return fast


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def plain() -> Any:
    return make_tokenizer()


# ---- tokenizer


def test_load_tokenizer_from_either_kind_of_directory(tmp_path):
    original = make_tokenizer(pad_token="<pad>")
    original.save_pretrained(tmp_path / "hf")
    original.save_pretrained(tmp_path / "checkpoint" / "tokenizer")
    (tmp_path / "checkpoint" / "model_config.yaml").write_text("family: llama\n")
    for name in ("hf", "checkpoint"):
        loaded = load_tokenizer(tmp_path / name)
        assert loaded("a b")["input_ids"] == ids("a b")
        assert (loaded.eos_token_id, loaded.pad_token_id) == (EOS, PAD)
        assert fingerprint(loaded) == fingerprint(original)


def test_padding_falls_back_to_eos(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == EOS


def test_fingerprint_tells_vocabularies_apart(plain):
    swapped = make_tokenizer(words=[*WORDS[:6], "b", "a", *WORDS[8:]])
    other_eos = make_tokenizer(eos_token="<|user|>")
    assert len({fingerprint(t) for t in (plain, swapped, other_eos)}) == 3
    assert fingerprint(plain) == fingerprint(make_tokenizer(pad_token="<pad>"))


def test_load_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match="no directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    make_tokenizer(eos_token=None).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(tmp_path / "endless")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "broken")


# ---- prompts


def test_prompts_from_every_source_are_equal(tmp_path, plain):
    records = [{"prompt": "a b", "answer": 3}, {"text": "c", "answer": None}]
    expected = [Prompt((6, 7), "a b", {"answer": 3}), Prompt((8,), "c", {"answer": None})]
    path = write_lines(tmp_path / "p.jsonl", records[0], "", records[1])
    assert read_prompts(path, plain, 8) == expected
    assert read_prompts(str(path), plain, 8) == expected
    assert read_prompts(records, plain, 8) == expected
    assert read_prompts(["a b", "c"], plain, 8) == [Prompt((6, 7), "a b"), Prompt((8,), "c")]


def test_prompts_from_a_datasets_directory(tmp_path, plain):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "a b", "answer": 3}, {"prompt": "c", "answer": 4}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "splits"))
    expected = [Prompt((6, 7), "a b", {"answer": 3}), Prompt((8,), "c", {"answer": 4})]
    assert read_prompts(tmp_path / "one", plain, 8) == expected
    assert read_prompts(tmp_path / "splits" / "train", plain, 8) == expected
    with pytest.raises(ValueError, match=r"several splits.*train"):
        read_prompts(tmp_path / "splits", plain, 8)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no data set"):
        read_prompts(tmp_path / "nothing", plain, 8)


@pytest.mark.parametrize(
    ("post", "text", "expected"),
    [
        (None, "a b", "a b"),
        ("<s> $A", "a b", "<s> a b"),
        ("<s> $A </s>", "a b", "<s> a b"),
        ("$A </s>", "a b", "a b"),
        ("<s> $A", "a </s>", "<s> a </s>"),  # the user's own
        ("<s> $A </s>", "a </s>", "<s> a </s>"),
    ],
)
def test_prompt_keeps_bos_but_not_the_tokenizers_eos(post, text, expected):
    (prompt,) = read_prompts([text], make_tokenizer(post), 8)
    assert list(prompt.token_ids) == ids(expected)


def test_chat_prompt_ends_in_the_assistants_header():
    tokenizer = make_tokenizer("<s> $A")
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "a b"}]
    (prompt,) = read_prompts([{"prompt": messages, "answer": 1}], tokenizer, 8)
    assert list(prompt.token_ids) == ids("<|user|> a b <|assistant|>")  # no BOS but the template's
    assert prompt.text == "<|user|> a b <|assistant|> "
    assert prompt.metadata == {"answer": 1}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"prompt": "a"}, "{broken"], r"p\.jsonl, line 2 is not JSON"),
        (
            [{"prompt": "a"}, "", {"promt": "a", "n": 1}],
            r'line 3 has no field "prompt": it has "promt".*rename "promt"',
        ),
        ([{"prompt": None, "answer": 1}], r'line 1 has no field "prompt": it has "answer"'),
        ([{}], r"line 1 has no field .* no field at all"),
        ([{"prompt": ""}], "line 1: the prompt is empty"),
        ([{"prompt": " "}], "line 1: the prompt has no token"),
        ([{"prompt": "a"}, {"prompt": "a b c d e"}], r"line 2: the prompt is 5 tokens long .* is 4: raise the limit"),
        ([{"prompt": 5}], "line 1: the prompt is a int"),
        ([["a"]], "line 1 is a list"),
        ([{"prompt": [{"role": "user", "content": "a"}]}], "no chat template"),
        ([""], "is empty: it must hold at least one prompt"),
    ],
)
def test_wrong_prompt_files_are_named(tmp_path, plain, lines, message):
    path = write_lines(tmp_path / "p.jsonl", *lines)
    with pytest.raises(ValueError, match=message) as caught:
        read_prompts(path, plain, 4)
    assert "\n" not in str(caught.value)


def test_missing_and_empty_prompt_sources(tmp_path, plain):
    with pytest.raises(ValueError, match="There is no file"):
        read_prompts(tmp_path / "nowhere.jsonl", plain, 4)
    with pytest.raises(ValueError, match="list of prompts is empty"):
        read_prompts([], plain, 4)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl", plain, 4)


@pytest.mark.parametrize("messages", [[], ["a"], [{"content": "a"}]])
def test_wrong_chat_messages_are_named(messages):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match="prompt 0"):
        read_prompts([{"prompt": messages}], tokenizer, 4)


# ---- order


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (10, 10), (3, 8), (1, 5), (7, 1)])
def test_every_epoch_visits_everything_once(size, batch_size):
    order = Order(size, seed=5, shuffle=True)
    visited = [index for step in range(3 * size) for index in order.batch(step, batch_size)]
    for epoch in range(len(visited) // size):
        assert Counter(visited[epoch * size : (epoch + 1) * size]) == Counter(range(size))


def test_order_is_a_function_of_seed_and_step():
    batches = [Order(50, 5, True).batch(step, 16) for step in range(20)]
    order = Order(50, 5, True)
    assert [order.batch(step, 16) for step in reversed(range(20))] == batches[::-1]
    assert Order(50, 6, True).batch(0, 16) != batches[0]
    epochs = [Order(50, 5, True).batch(step, 50) for step in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert Order(50, -1, True).batch(0, 50) != epochs[0]


def test_unshuffled_order_wraps_around():
    assert [Order(3, 0, False).batch(step, 2) for step in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_streams_hand_out_records(plain):
    prompts = read_prompts(["a", "b", "c"], plain, 4)
    batch = Stream(prompts, batch_size=7, seed=1, shuffle=True).batch(2)
    assert len(batch) == 7
    assert Stream(prompts, batch_size=7, seed=1).batch(2) == batch
    assert Stream(prompts, 2, seed=0, shuffle=False).batch(1) == [prompts[2], prompts[0]]
    texts = read_texts(["a b", "b c", "c d"], plain, 8, "all")
    assert Stream(texts, batch_size=2, seed=0, shuffle=False).batch(1) == [texts[2], texts[0]]


# ---- texts


def learned(text: Text) -> str:
    """The tokens, those that are learned in upper case."""
    return " ".join(
        WORDS[token].upper() if mask else WORDS[token]
        for token, mask in zip(text.token_ids, text.loss_mask, strict=True)
    )


def read_one(record: Any, tokenizer: Any, length: int = 32, train_on: Any = "response") -> str:
    (text,) = read_texts([record], tokenizer, length, train_on)
    return learned(text)


@pytest.mark.parametrize(
    ("record", "response", "everything"),
    [
        ({"prompt": "a b", "response": "c d"}, "<s> a b C D </S>", "<s> A B C D </S>"),
        ({"prompt": "", "response": "c d"}, "<s> C D </S>", "<s> C D </S>"),
        ({"prompt": "a", "response": "c </s>"}, "<s> a C </S>", "<s> A C </S>"),
        (["a", "b", "c d", "e"], "<s> a B c d E </S>", "<s> A B C D E </S>"),
        ({"text": "a b"}, "<s> A B </S>", "<s> A B </S>"),
        ("a b", "<s> A B </S>", "<s> A B </S>"),
    ],
)
def test_what_is_learned(record, response, everything):
    for post in ("<s> $A", "<s> $A </s>"):
        tokenizer = make_tokenizer(post)
        assert read_one(record, tokenizer) == response
        assert read_one(record, tokenizer, train_on="all") == everything


def test_first_token_is_never_learned(plain):
    assert read_one("a b", plain) == "a B </S>"
    assert read_one({"prompt": "", "response": "c d"}, plain) == "c D </S>"


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT])
def test_chat_learns_the_assistants_turns(template):
    tokenizer = make_tokenizer("<s> $A")
    tokenizer.chat_template = template
    chat = [("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e")]
    record = {"messages": [{"role": role, "content": content} for role, content in chat]}
    expected = "<|user|> a <|assistant|> B C </S> <|user|> d <|assistant|> E </S>"
    assert read_one(record, tokenizer) == expected
    everything = "<|user|> A <|ASSISTANT|> B C </S> <|USER|> D <|ASSISTANT|> E </S>"
    assert read_one(record, tokenizer, train_on="all") == everything
    open_ended = {"messages": [*record["messages"], {"role": "user", "content": "f"}]}
    assert read_one(open_ended, tokenizer) == f"{expected} <|user|> f"


def test_chat_template_without_eos_still_learns_to_stop_and_nothing_after_it():
    tokenizer = make_tokenizer()
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tokenizer.chat_template = CHAT.replace("</s> ", "")
    assert read_one(record, tokenizer) == "<|user|> a <|assistant|> B </S>"
    tokenizer.chat_template = CHAT.replace("</s> ", "</s> j ")
    assert read_one(record, tokenizer) == "<|user|> a <|assistant|> B </S>"


def test_chat_prompt_with_a_response_is_the_rollouts_prompt():
    tokenizer = make_tokenizer("<s> $A")
    tokenizer.chat_template = CHAT
    messages = [{"role": "user", "content": "a b"}]
    (prompt,) = read_prompts([{"prompt": messages}], tokenizer, 8)
    (text,) = read_texts([{"prompt": messages, "response": "c"}], tokenizer, 8, "response")
    assert text.token_ids == (*prompt.token_ids, *ids("c </s>"))


def test_chat_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT.replace(
        "{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else 'j' }}"
    )
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    with pytest.raises(ValueError, match=r"text 0: messages.*differently.*generation"):
        read_one({"messages": [{"role": r, "content": c} for r, c in chat]}, tokenizer)


@pytest.mark.parametrize(
    ("post", "record", "length", "expected", "lost"),
    [
        ("<s> $A", {"prompt": "a b c d", "response": "e f"}, 8, "<s> a b c d E F </S>", None),
        ("<s> $A", {"prompt": "a b c d", "response": "e f"}, 6, "<s> c d E F </S>", "1 lost the start .* 0 the end"),
        ("<s> $A", {"prompt": "a b c d", "response": "e f"}, 4, "<s> E F </S>", "1 lost the start .* 0 the end"),
        ("<s> $A", {"prompt": "a b c d", "response": "e f"}, 3, "<s> E F", "1 lost the start .* 1 the end"),
        (None, {"prompt": "a b c d", "response": "e f"}, 5, "c d E F </S>", "1 lost the start .* 0 the end"),
        (None, {"prompt": "a b c d", "response": "e f"}, 2, "d E", "1 lost the start .* 1 the end"),
        (None, {"prompt": "", "response": "e f g"}, 3, "e F G", "0 lost the start .* 1 the end"),
        ("<s> $A", ["a", "b", "c", "d"], 5, "<s> B c D </S>", "1 lost the start .* 0 the end"),
        ("<s> $A", "a b c", 3, "<s> A B", "0 lost the start .* 1 the end"),
    ],
)
def test_too_long_texts_are_cut_and_counted_once(post, record, length, expected, lost):
    tokenizer = make_tokenizer(post)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert read_one(record, tokenizer, length) == expected
    messages = [str(warning.message) for warning in caught if "max_sequence_length" in str(warning.message)]
    assert len(messages) == (lost is not None)
    if lost:
        with pytest.warns(UserWarning, match=lost.replace("1 lost", "2 lost").replace("1 the", "2 the")):
            read_texts([record, "a", record], tokenizer, length, "response")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a"}, r'line 2 has no field "response": it has "prompt"'),
        ({"prompt": "a", "respnse": "b"}, 'rename "respnse"'),
        ({"prompt": "a", "response": ""}, "line 2: the response is empty"),
        ({"prompt": "a", "response": 5}, "line 2: the response is a int"),
        ({"prompt": 5, "response": "a"}, "line 2: the prompt is a int"),
        ({"txt": "a"}, r'line 2 has no field "text": it has "txt".*rename "txt"'),
        ({"text": ""}, "line 2: the text is empty"),
        ({"text": ["a"]}, "line 2: the text is a list"),
        (["a", "b", "c"], "line 2 has 3 turns"),
        ([], "line 2 has 0 turns"),
        (["a", ""], "line 2: the turn 1 is empty"),
        ([5, "a"], "line 2: turn 0 is a int"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: messages.*no chat template"),
        (5, "line 2 is a int"),
    ],
)
def test_wrong_texts_are_named(tmp_path, plain, record, message):
    path = write_lines(tmp_path / "t.jsonl", {"text": "a"}, record)
    with pytest.raises(ValueError, match=message) as caught:
        read_texts(path, plain, 8, "response")
    assert "\n" not in str(caught.value)


def test_texts_with_nothing_to_learn(plain):
    with pytest.raises(ValueError, match="at least 2"):
        read_texts(["a"], plain, 1, "all")
    plain.chat_template = CHAT
    with pytest.raises(ValueError, match="no turn of the assistant"):
        read_texts([{"messages": [{"role": "user", "content": "a"}]}], plain, 8, "response")
    with pytest.raises(ValueError, match="text 0 has nothing to learn"):
        read_texts([" "], plain, 8, "response")


# ---- batches


def test_padding():
    tokens, mask, lengths = pad_tokens([[5, 6, 7], [8], []], pad_id=9, multiple_of=4)
    assert tokens.tolist() == [[5, 6, 7, 9], [8, 9, 9, 9], [9, 9, 9, 9]]
    assert mask.tolist() == [[True] * 3 + [False], [True] + [False] * 3, [False] * 4]
    assert lengths.tolist() == [3, 1, 0]
    assert (tokens.dtype, mask.dtype, lengths.dtype) == (torch.int64, torch.bool, torch.int64)
    assert pad_tokens([[5, 6, 7]], 9)[0].shape == (1, 3)
    assert pad_tokens([], 9, multiple_of=8)[0].shape == (0, 0)


def test_padding_of_texts_and_samples():
    texts = [Text((4, 5, 6), (False, False, True)), Text((7, 8), (False, True))]
    tokens, mask, lengths = pad_texts(texts, pad_id=0)
    assert tokens.tolist() == [[4, 5, 6], [7, 8, 0]]
    assert mask.tolist() == [[False, False, True], [False, True, False]]
    assert lengths.tolist() == [3, 2]
    samples = [
        Sample(Prompt((4, 5), ""), 0, (6, EOS), "", "eos"),
        Sample(Prompt((7,), ""), 1, (8,), "", "length"),
    ]
    tokens, mask, lengths = pad_samples(samples, pad_id=EOS, multiple_of=2)
    assert tokens.tolist() == [[4, 5, 6, EOS], [7, 8, EOS, EOS]]
    assert mask.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert lengths.tolist() == [4, 2]
