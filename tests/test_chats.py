"""Chats as people have them: what is learned of them, what is scored, and that both are what a rollout has."""

from __future__ import annotations

import datetime
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from nemo_rlhf.algorithms.reward import pair_loss
from nemo_rlhf.algorithms.roles import open_role
from nemo_rlhf.algorithms.scorer import score_texts
from nemo_rlhf.config.optim import OptimConfig
from nemo_rlhf.config.schema import DataConfig
from nemo_rlhf.data import chats, training_templates
from nemo_rlhf.data.batches import pad_for_scores
from nemo_rlhf.data.chat_format import response_ends
from nemo_rlhf.data.dialogues import read_dialogues
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.pairs import read_pairs
from nemo_rlhf.data.prompts import encode_prompt, read_prompts
from nemo_rlhf.data.scores import encode_reply, read_scores
from nemo_rlhf.data.texts import pieces_of, read_texts
from nemo_rlhf.data.tokenizer import load_tokenizer, save_template, use_template
from nemo_rlhf.generation.ending import Ending
from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.models.reward import RewardModel
from nemo_rlhf.parallel import state
from tests.chat_templates import FORMS, ORIGINALS, Form, chat_tokenizer, original, save
from tests.workers.parallel_worker import Cut, config_of

REWRITING = "qwen3"  # writes earlier turns differently when more follow
ALL = pytest.mark.parametrize("name", FORMS)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


CHAT = [user("Hi there"), assistant("Hello!"), user("And?"), assistant("<b>Bye</b>")]


def marked(tokenizer: Any, record: Any) -> str:
    """A record's text with what is learned in brackets."""
    pieces = pieces_of("record", record, tokenizer)
    return "".join(f"[{tokenizer.decode(ids)}]" if learned else tokenizer.decode(ids) for ids, learned in pieces)


def learned(tokenizer: Any, record: Any) -> list[str]:
    return [tokenizer.decode(ids) for ids, is_learned in pieces_of("record", record, tokenizer) if is_learned]


def thinking(form: str) -> Form:
    """A form whose template keeps the thoughts of earlier turns, as the edits of the real one do."""
    return Form(FORMS[form].template.replace("loop.index0 > ns.last", "true"), FORMS[form].eos, FORMS[form].end)


# ---- where a response ends


@ALL
def test_a_response_ends_where_the_template_ends_a_turn(name: str) -> None:
    form = FORMS[name]
    tokenizer = chat_tokenizer(thinking(name) if name == REWRITING else form)
    ends = {tokenizer.decode([end]) for end in response_ends(tokenizer)}
    assert ends == {form.eos, form.end}
    first, second = learned(tokenizer, {"messages": CHAT})
    assert first.endswith(f"Hello!{form.end}") or first == f" Hello! {form.end}"  # Llama 2 has blanks
    assert second.endswith(form.end) and second.count(form.end) == 1
    (text,) = read_texts([{"messages": CHAT}], tokenizer, 1000, "response")
    assert text.token_ids[-1] == tokenizer.convert_tokens_to_ids(form.end) and text.loss_mask[-1]


@ALL
def test_a_chats_history_is_that_of_its_rollout(name: str) -> None:
    """The prompt of a rollout is, token for token, what stands in front of the last turn where that is learned."""
    tokenizer = chat_tokenizer(thinking(name) if name == REWRITING else FORMS[name])
    (prompt,) = read_prompts([{"prompt": CHAT[:3]}], tokenizer, 1000)
    *before, (turn, is_learned) = pieces_of("record", {"messages": CHAT}, tokenizer)
    history = [token for ids, _ in before for token in ids]
    assert is_learned and turn
    if name == "deepseek":  # whose rollouts open with a thought
        assert tokenizer.decode(prompt.token_ids) == tokenizer.decode(history) + "<think>\n"
    else:
        assert list(prompt.token_ids) == history
    (answered,) = read_texts([{"prompt": CHAT[:3], "response": "<b>Bye</b>"}], tokenizer, 1000, "response")
    assert answered.token_ids[: len(prompt.token_ids)] == prompt.token_ids
    end = tokenizer.convert_tokens_to_ids(FORMS[name].end)
    assert answered.token_ids[-1] == end and sum(answered.loss_mask) == len("<b>Bye</b>") + 1


@ALL
@pytest.mark.parametrize("chat", [CHAT, CHAT[:2]], ids=["two turns", "one"])
def test_what_a_reward_model_learns_is_what_it_is_asked(name: str, chat: list[dict[str, Any]]) -> None:
    tokenizer = chat_tokenizer(FORMS[name])
    answer = chat[-1]["content"]
    (prompt,) = read_prompts([{"prompt": chat[:-1]}], tokenizer, 1000)
    # what PPO and serve-reward have: the prompt's text, and the response without special tokens
    asked = encode_reply(prompt.text, answer, tokenizer)
    end = tokenizer.convert_tokens_to_ids(FORMS[name].end)
    assert asked[-1] == end and asked.count(end) == tokenizer(prompt.text)["input_ids"].count(end) + 1
    worse = [*chat[:-1], assistant("no")]
    whole = {"chosen": chat, "rejected": worse, "messages": chat, "score": 1}
    parts = {"prompt": chat[:-1], "chosen": answer, "rejected": "no", "response": answer, "score": 1}
    (pair,), (score,) = read_pairs([whole], tokenizer, 1000), read_scores([whole], tokenizer, 1000)
    assert pair.chosen == score.token_ids and pair.chosen[-1] == end
    assert pair.rejected == read_pairs([{**whole, "chosen": worse, "rejected": chat}], tokenizer, 1000)[0].chosen
    assert read_pairs([parts], tokenizer, 1000)[0].chosen == asked == read_scores([parts], tokenizer, 1000)[0].token_ids
    text = tokenizer.decode(pair.chosen)
    if name == "llama2":
        assert text.replace(" <b>Bye</b> ", "<b>Bye</b>").replace(" Hello! ", "Hello!") == tokenizer.decode(
            asked
        ).replace(" Hello! ", "Hello!")
    elif name in ("qwen3", "deepseek"):  # where thoughts stand in front of an answer, it is learned as without
        assert text.replace("<think>\n\n</think>\n\n", "") == tokenizer.decode(asked).replace("<think>\n", "")
    else:
        assert pair.chosen == asked


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classifier")
    chat_tokenizer(FORMS["chatml"]).save_pretrained(directory)
    torch.manual_seed(3)
    LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            num_labels=1,
            pad_token_id=0,
        )
    ).save_pretrained(directory)
    return directory


def test_a_reward_model_of_chats_knows_what_ppo_asks_it(classifier: Path) -> None:
    """It learns whole chats of every form, and then tells the better response of other questions, asked as a reward
    source asks: with a rollout's prompt and the response, both as text."""
    tokenizers = {name: chat_tokenizer(form) for name, form in FORMS.items()}

    def pair(number: int) -> tuple[str, str, str]:
        return f"What is {number}?", f"{number} is fine", f"{number} is grim"

    def whole(tokenizer: Any, numbers: range) -> list[Any]:
        records = [
            {"chosen": [user(question), assistant(better)], "rejected": [user(question), assistant(worse)]}
            for question, better, worse in map(pair, numbers)
        ]
        return read_pairs(records, tokenizer, 256)

    state.set_environment_for_one_process()
    state.initialize(1, 1, seed=1)
    model = open_role(RewardModel, config_of(Cut(), classifier, micro_batch=32), str(classifier), "32", 1)
    model.make_trainable(OptimConfig(lr=3e-3), 30)
    pairs = [one for tokenizer in tokenizers.values() for one in whole(tokenizer, range(10, 18))]
    tokens, mask, lengths = pad_for_scores([side for one in pairs for side in (one.chosen, one.rejected)], 0)
    targets = torch.zeros(tokens.shape)
    for _ in range(30):
        microbatches = model.cut(tokens, mask, lengths, range(0, len(tokens), 2), {"targets": targets}, together=2)
        model.learn(microbatches, pair_loss(len(pairs)))

    for name, tokenizer in tokenizers.items():
        right = 0
        for number, held_out in zip(range(20, 28), whole(tokenizer, range(20, 28)), strict=True):
            question, *answers = pair(number)
            (prompt,) = read_prompts([{"prompt": [user(question)]}], tokenizer, 256)
            asked = [encode_reply(prompt.text, answer, tokenizer) for answer in answers]
            scores = score_texts(model, asked, 0)
            right += int(scores[0] > scores[1])
            if name not in ("llama2", "qwen3", "deepseek"):  # these write something else around an answer in a chat
                assert torch.equal(scores, score_texts(model, [held_out.chosen, held_out.rejected], 0))
        assert right == 8, name


def test_special_tokens_that_a_policy_spells_are_words() -> None:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    spelled = "a<|im_end|>\n<|im_start|>user\nb"  # by a policy; who writes this into a chat is told
    ids = encode_reply(prompt, spelled, tokenizer)
    assert ids.count(end) == 2 and tokenizer.decode(ids) == f"{prompt}{spelled}<|im_end|>"
    assert encode_reply(prompt, "a<|im_end|>", tokenizer) == encode_reply(prompt, "a", tokenizer)
    (pair,) = read_pairs([{"prompt": prompt, "chosen": spelled, "rejected": "c"}], tokenizer, 1000)
    assert pair.chosen == ids


def test_what_stands_behind_a_responses_end_is_left_out() -> None:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    assert marked(tokenizer, {"prompt": "Hi ", "response": "yes<|im_end|>\n"}) == "Hi [yes<|im_end|>]"
    assert marked(tokenizer, {"prompt": "Hi ", "response": "yes"}) == "Hi [yes<|endoftext|>]"
    assert marked(tokenizer, {"prompt": "Hi ", "response": "yes", "done": False}) == "Hi [yes]"
    chat = {"prompt": [user("Hi")], "response": "yes"}
    assert marked(tokenizer, chat).endswith("assistant\n[yes<|im_end|>]")


def test_the_end_of_a_turn_may_be_the_beginning_of_the_next() -> None:
    """GLM's turns are closed by the next one's header, which its generation_config.json names."""
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    form = Form(template + "<|assistant|>\n{% endif %}", "<|endoftext|>", "<|user|>")
    tokenizer = chat_tokenizer(form)
    tokenizer.generation_eos_ids = tuple(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>"]))
    assert learned(tokenizer, {"messages": CHAT}) == ["Hello!<|user|>", "<b>Bye</b><|endoftext|>"]


# ---- BOS


@ALL
def test_bos_stands_once_at_the_start(name: str) -> None:
    form = FORMS[name]
    tokenizer = chat_tokenizer(form)
    texts = ["Hi", f"{form.bos or ''}Hi", tokenizer.apply_chat_template(CHAT[:1], tokenize=False)]
    bos = tokenizer.bos_token_id
    for text in texts:
        ids, _ = encode_prompt(text, tokenizer, "prompt")
        want = 0 if bos is None or (name == "zephyr" and text == texts[2]) else 1
        assert [ids[:1], ids[1:].count(bos)] == [[bos] if want else ids[:1], 0], text
        assert ids[:1] != [bos] or want
        for record in ({"prompt": text, "response": "a"}, {"text": f"{text}a"}, [text, "a"]):
            (read,) = read_texts([record], tokenizer, 1000, "all")
            assert read.token_ids[: len(ids)] == tuple(ids)
        assert encode_prompt(f"{form.bos or ''}{form.bos or ''}Hi", tokenizer, "prompt")[0].count(bos) == (
            bos is not None
        )
        assert encode_reply(text, "a", tokenizer)[: len(ids)] == tuple(ids)
    (chat,) = read_prompts([{"prompt": CHAT[:1]}], tokenizer, 1000)
    assert list(chat.token_ids) == tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    assert encode_prompt(chat.text, tokenizer, "prompt")[0] == list(chat.token_ids)


def test_a_text_that_begins_a_little_as_a_chat_does_is_text() -> None:
    template = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    tokenizer = chat_tokenizer(Form(template, "</s>", "</s>", "<s>", adds_bos=True))
    for text, bos in (("### Title\nHi", 1), ("### user:\nHi", 0), ("Hi", 1)):
        assert encode_prompt(text, tokenizer, "prompt")[0].count(tokenizer.bos_token_id) == bos


# ---- what messages may be


@pytest.mark.parametrize("content", [[{"type": "text", "text": "He"}, {"type": "text", "text": "y"}], ["He", "y"]])
def test_parts_of_text_are_joined(content: Any) -> None:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    plain = [user("Hey"), assistant("Hey")]
    assert marked(tokenizer, {"messages": [user(content), assistant(content)]}) == marked(
        tokenizer, {"messages": plain}
    )


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED: dict[str, tuple[Any, str]] = {
    "an image": ([user([IMAGE]), assistant("a")], 'message 0 has a part of type "image_url", and only text'),
    "a number": ([user(3), assistant("a")], 'message 0: "content" is a int, and must be text'),
    "an object": ([user({"text": "a"}), assistant("a")], 'message 0: "content" is a dict'),
    "a part without text": ([user([{"type": "text"}]), assistant("a")], "message 0 has a part without text"),
    "another name": ([{"role": "user", "text": "hello"}, assistant("a")], 'message 0 has no field "content"'),
    "null": ([user("a"), assistant(None)], "message 1, of the assistant, is empty"),
    "nothing": ([user("a"), assistant("")], "message 1, of the assistant, is empty"),
    "blanks": ([user(" \n"), assistant("b")], "message 0, of the user, is empty"),
    "no role": ([{"content": "a"}], 'each must be an object with "role"'),
    "no messages": ([], 'each must be an object with "role"'),
    "calls": ([user("a"), assistant(None, tool_calls=[{"name": "f"}])], 'message 1 has "tool_calls", which the'),
    "thoughts": ([user("a"), assistant("b", reasoning="hm")], 'message 1 has "reasoning", which the tokenizer'),
    "words behind an end": ([user("a"), assistant("b<|im_end|> c")], "message 1: the response goes on behind <.im_end"),
    "half a weight": ([user("a"), assistant("b", weight=0.5)], "message 1 has the weight 0.5: give 1, or 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_messages_that_would_be_written_otherwise_are_refused(kind: str) -> None:
    messages, sentence = REFUSED[kind]
    tokenizer = chat_tokenizer(FORMS["chatml"])
    for record in ({"messages": messages}, {"prompt": messages, "response": "a"}):
        with pytest.raises(ValueError, match="record.*" + sentence):
            pieces_of("record", record, tokenizer)
    with pytest.raises(ValueError, match="prompt 0.*" + sentence):
        read_prompts([{"prompt": messages}] if messages else [{"prompt": [[]]}], tokenizer, 1000)


def test_empty_turns_are_dropped_where_that_is_asked_for() -> None:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    chat = [user("Hi"), assistant([{"type": "text", "text": " "}]), user(""), assistant("Yes"), user(None)]
    (text,) = read_texts([{"messages": [CHAT[0], assistant("Yes")]}], tokenizer, 1000, "response")
    intake = Intake(drops_empty_turns=True)
    found = read_texts([{"messages": [CHAT[0], *chat[1:]]}], tokenizer, 1000, "response", intake=intake)
    assert (found, intake.num_empty_turns) == ([text], 3)
    pair = {"prompt": [user("Hi"), user("")], "chosen": "a", "rejected": "b"}
    assert len(read_pairs([pair], tokenizer, 1000, intake=intake)) == 1 and intake.num_empty_turns == 4
    with pytest.raises(ValueError, match=r"message 1, of the assistant, is empty.*data\.empty_turns=drop"):
        read_texts([{"messages": chat}], tokenizer, 1000, "response")


def test_who_speaks_has_other_names() -> None:
    """And a message of somebody whom a template passes over is not lost without a word."""
    tokenizer = chat_tokenizer(Form(original("qwen3"), "<eos>", "<|im_end|>"))
    chat = [{"role": "developer", "content": "Be kind"}, {"role": "human", "content": "Hi"}]
    (prompt,) = read_prompts([{"prompt": chat}], tokenizer, 1000)
    assert (
        prompt.text == "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match=r"record.* does not write message 2, of the critic"):
        pieces_of("record", {"prompt": [*chat, {"role": "critic", "content": "No"}], "response": "a"}, tokenizer)
    phi = chat_tokenizer(Form(original("phi3"), "<eos>", "<|end|>"))
    with pytest.raises(ValueError, match="does not write message 1, of the tool"):
        read_scores(
            [{"messages": [user("Hi"), {"role": "tool", "content": "42"}, assistant("a")], "score": 1}], phi, 99
        )


def test_tool_results_may_be_written_as_json() -> None:
    tokenizer = chat_tokenizer(Form(original("llama3_1"), "<eos>", "<|eot_id|>", "<bos>"))
    calls = [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}]
    chat = [user("Hi"), assistant(None, tool_calls=calls), {"role": "tool", "content": 'a "sunny" day in Köln'}]
    assert "sunny" in read_prompts([{"prompt": chat}], tokenizer, 5000)[0].text


def test_a_rendered_chat_as_text_ends_where_it_does_as_messages() -> None:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    (score,) = read_scores([{"text": text, "score": 1}], tokenizer, 1000)
    assert score.token_ids == read_scores([{"messages": CHAT, "score": 1}], tokenizer, 1000)[0].token_ids
    assert marked(tokenizer, {"text": text}) == f"[{text.removesuffix(chr(10))}]"


def test_a_template_that_marks_too_little_is_refused() -> None:
    written = (
        "{% if m.tool_calls %}{{ m.tool_calls }}{% elif m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    )
    template = FORMS["chatml"].template.replace("{{ m.content }}", written)
    tokenizer = chat_tokenizer(Form(template, "<|endoftext|>", "<|im_end|>"))
    called = assistant(None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    with pytest.raises(ValueError, match=r"the chat template marks \d of the assistant's 4 turns"):
        pieces_of("record", {"messages": [*CHAT, user("a"), called, user("b"), called]}, tokenizer)


def test_the_last_turn_of_a_template_without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of Mistral's, which writes the system's message in front of the user's last one."""
    template = (
        "{{ bos_token }}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{% if loop.index0 == ns.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer(Form(template, "</s>", "</s>", "<s>", adds_bos=True))
    chat = [{"role": "system", "content": "Be kind"}, *CHAT]
    (score,) = read_scores([{"messages": chat, "score": 1}], tokenizer, 1000)
    assert tokenizer.decode(score.token_ids).endswith("[INST] Be kind\n\nAnd?[/INST] <b>Bye</b></s>")


def test_a_switch_of_a_template_is_no_place_for_thoughts() -> None:
    template = FORMS["chatml"].template + "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    tokenizer = chat_tokenizer(Form(template, "<|endoftext|>", "<|im_end|>"))
    with pytest.raises(ValueError, match='has "reasoning_content", which the tokenizer'):
        pieces_of("record", {"messages": [user("a"), assistant("b", reasoning_content="hm")]}, tokenizer)


def test_an_empty_system_message_is_one() -> None:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    chat = [{"role": "system", "content": ""}, *CHAT]
    assert marked(tokenizer, {"messages": chat}).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")


def test_a_turn_of_weight_zero_is_not_learned() -> None:
    tokenizer = chat_tokenizer(FORMS["chatml"])
    chat = [CHAT[0], assistant("Hello!", weight=0), CHAT[2], assistant("Bye", weight=1)]
    assert learned(tokenizer, {"messages": chat}) == ["Bye<|im_end|>"]
    with pytest.raises(ValueError, match="no turn of the assistant to learn"):
        pieces_of("record", {"messages": chat[:2]}, tokenizer)


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_tools_and_variables_reach_the_template() -> None:
    tokenizer = chat_tokenizer(FORMS["qwen3"])
    chat = CHAT[:1]
    for given_as in (TOOLS, json.dumps(TOOLS)):
        (prompt,) = read_prompts([{"prompt": chat, "tools": given_as}], tokenizer, 1000)
        assert prompt.text == tokenizer.apply_chat_template(
            chat, tools=TOOLS, tokenize=False, add_generation_prompt=True
        )
    kwargs = {"enable_thinking": False}
    (plain,) = read_prompts([{"prompt": chat}], tokenizer, 1000)
    (quick,) = read_prompts([{"prompt": chat, "chat_template_kwargs": kwargs}], tokenizer, 1000)
    assert quick.text == plain.text + "<think>\n\n</think>\n\n"
    use_template(tokenizer, None, kwargs)
    assert read_prompts([{"prompt": chat}], tokenizer, 1000)[0].text == quick.text
    slow = {"prompt": chat, "chat_template_kwargs": {"enable_thinking": True}}
    assert read_prompts([slow], tokenizer, 1000)[0].text == plain.text  # the record decides
    for record, sentence in (
        ({"chat_template_kwargs": {"enable_thinkin": False}}, 'no variable "enable_thinkin"'),
        ({"chat_template_kwargs": {"tokenize": True}}, '"tokenize" is no variable'),
        ({"chat_template_kwargs": 3}, "must be an object"),
        ({"tools": 3}, '"tools" must be a list'),
        ({"tools": "{"}, '"tools" is text that is not JSON'),
    ):
        with pytest.raises(ValueError, match=f"prompt 0: .*{sentence}"):
            read_prompts([{"prompt": chat, **record}], tokenizer, 1000)
    with pytest.raises(ValueError, match='has "tools", which the tokenizer\'s chat template does not write'):
        read_prompts([{"prompt": chat, "tools": TOOLS}], chat_tokenizer(FORMS["chatml"]), 1000)
    with pytest.raises(ValueError, match=r'data\.chat_template_kwargs: the chat template has no variable "x"'):
        use_template(tokenizer, None, {"x": 1})


@pytest.mark.parametrize("arguments", ['{"city": "Bonn"}', {"city": "Bonn"}])
def test_arguments_of_a_call_are_an_object_for_a_template_that_writes_json(arguments: Any) -> None:
    tokenizer = chat_tokenizer(thinking("qwen3"))
    chat = [user("Hi"), assistant(None, tool_calls=[{"function": {"name": "weather", "arguments": arguments}}])]
    assert '<tool_call>{"city": "Bonn"}</tool_call><|im_end|>]' in marked(tokenizer, {"messages": chat})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_go_under_the_name_that_the_template_reads(field: str) -> None:
    tokenizer = chat_tokenizer(thinking("qwen3"))
    chat = [user("Hi"), assistant("Yes", **{field: "hm"})]
    assert learned(tokenizer, {"messages": chat}) == ["<think>\nhm\n</think>\n\nYes<|im_end|>"]


@ALL
def test_a_prompt_may_end_in_the_beginning_of_an_answer(name: str) -> None:
    tokenizer = chat_tokenizer(thinking(name) if name == REWRITING else FORMS[name])
    chat = [*CHAT[:3], assistant("It is")]
    (prompt,) = read_prompts([{"prompt": chat}], tokenizer, 1000)
    assert prompt.text.endswith("It is") and prompt.text.count("And?") == 1
    assert tokenizer.decode(prompt.token_ids) == prompt.text
    assert marked(tokenizer, {"prompt": chat, "response": " so"}) == f"{prompt.text}[ so{FORMS[name].end}]"


# ---- templates that write earlier turns differently


def test_where_turns_need_not_be_told_apart_any_template_will_do() -> None:
    tokenizer = chat_tokenizer(FORMS["qwen3"])
    assert len(read_pairs([{"chosen": CHAT, "rejected": [*CHAT[:3], assistant("no")]}], tokenizer, 1000)) == 1
    assert len(read_scores([{"messages": CHAT, "score": 1}], tokenizer, 1000)) == 1
    assert len(read_prompts([{"prompt": CHAT[:3]}], tokenizer, 1000)) == 1
    assert len(read_texts([{"messages": CHAT[:2]}], tokenizer, 1000, "response")) == 1
    for read in (
        lambda: read_texts([{"messages": CHAT}], tokenizer, 1000, "response"),
        lambda: read_dialogues([{"messages": CHAT, "reward": 1}], tokenizer, 1000),
    ):
        with pytest.raises(ValueError, match=r"0: messages.*differently when more follow.*data\.chat_template"):
            read()


def test_a_known_template_is_learned_with_one_that_keeps_thoughts(monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS["qwen3"]
    digest = hashlib.sha256(form.template.encode()).hexdigest()
    monkeypatch.setitem(training_templates.EDITS, digest, ("Test", (("loop.index0 > ns.last", "true"),)))
    tokenizer = chat_tokenizer(form)
    with pytest.warns(UserWarning, match="The chat template of Test drops thoughts of earlier turns"):
        found = learned(tokenizer, {"messages": CHAT})
    assert found == learned(chat_tokenizer(thinking("qwen3")), {"messages": CHAT})
    assert found[0].startswith("<think>\n\n</think>\n\nHello!")


def test_a_chat_that_the_assistant_begins() -> None:
    for name in ("chatml", "llama3", "phi", "qwen3"):
        tokenizer = chat_tokenizer(thinking(name) if name == "qwen3" else FORMS[name])
        first, second = learned(tokenizer, {"messages": [assistant("Welcome"), user("Hi"), assistant("Yes")]})
        assert first.endswith(f"Welcome{FORMS[name].end}") and second.endswith(f"Yes{FORMS[name].end}")


PLAIN = sorted(path.stem for path in ORIGINALS.glob("*.jinja") if (ORIGINALS / f"{path.stem}_training.jinja").is_file())
# Read images in a form of their own (parts), or are of another kind (diffusion).
PLAIN = [name for name in PLAIN if name not in ("idefics3", "llava_next", "smolvlm", "qwen2_5_vl", "diffusion_gemma")]


def test_the_originals_are_there() -> None:
    assert {"qwen3", "qwen2_5", "llama3", "gemma", "phi3", "deepseekv3", "glm4moe"} <= set(PLAIN)


THOUGHT = [*CHAT[:1], assistant("<think>\nhm\n</think>\n\nHello!"), *CHAT[2:]]
KEEP_THOUGHTS = ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "deepseek_r1_distill", "llama3", "gemma")
CLOSINGS = ("<turn|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|end|>", "<|user|>")
HEADERS = ("", "\n", "<think>", "<think>\n", "<think>\n\n</think>\n\n", "<｜Assistant｜>", "<｜Assistant｜><think>\n")


@pytest.mark.parametrize(
    ("name", "chat"), [*((name, CHAT) for name in PLAIN), *((name, THOUGHT) for name in KEEP_THOUGHTS)]
)
def test_models_own_templates_teach_what_trl_teaches(name: str, chat: list[dict[str, Any]]) -> None:
    """TRL marks the assistant's turns by hand, in a copy of each. Ours end at the token that ends a response, and begin
    where a rollout does, behind the header; TRL's have some of the header, and what stands behind the end."""
    tokenizer = chat_tokenizer(Form(original(name), "<eos>", "<eos>", "<bos>"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = learned(tokenizer, {"messages": chat})
    ends = [tokenizer.decode([end]) for end in response_ends(tokenizer)]
    tokenizer.chat_template = original(f"{name}_training")
    marks = [mark for mark in learned_by_trl(tokenizer, chat) if mark != "<eos>"]
    assert len(found) == len(marks) == 2
    for ours, mark, message in zip(found, marks, chat[1::2], strict=True):
        words = next((ours.removesuffix(end) for end in ends if ours.endswith(end)), ours).rstrip("\n")
        header, _, behind = mark.partition(words)
        assert words.endswith(message["content"][-6:]) and words in mark
        assert header in (*HEADERS, "<|start|>assistant")
        assert behind.strip("\n") in (
            "",
            *ends,
            "<turn|>",
            "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "<|end|>",
            "<|user|>",
        )


def learned_by_trl(tokenizer: Any, chat: list[dict[str, Any]]) -> list[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    (whole,), (spans,) = render_jinja_template(
        [chat],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [whole[start:end] for start, end in spans]


def test_every_known_template_is_one_of_the_originals() -> None:
    digests = {hashlib.sha256(original(name).strip().encode()).hexdigest(): name for name in PLAIN}
    assert set(training_templates.EDITS) <= set(digests)
    for digest, name in digests.items():
        if digest in training_templates.EDITS:
            with pytest.warns(UserWarning, match="drops thoughts of earlier turns"):
                assert training_templates.training_template(original(name)) != original(name)


def test_a_dated_template_writes_the_day_of_the_run() -> None:
    chat = CHAT[:2]
    for name, written in (("llama3_2", "Today Date: 02 Jan 2026\n"), ("gptoss", "Current date: 2026-01-02\n")):
        tokenizer = chat_tokenizer(Form(original(name), "<eos>", "<eos>", "<bos>"))
        tokenizer.chat_date = datetime.date(2026, 1, 2)
        (prompt,) = read_prompts([{"prompt": chat[:1]}], tokenizer, 1000)
        assert written in prompt.text
        assert written in marked(tokenizer, {"messages": chat})
        assert written in tokenizer.decode(read_scores([{"messages": chat, "score": 1}], tokenizer, 1000)[0].token_ids)


# ---- long chats


@pytest.mark.parametrize("name", ["chatml", "llama2", "phi"])
def test_a_long_chat_takes_time_that_grows_with_its_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in characters that the template writes."""
    tokenizer = chat_tokenizer(FORMS[name])
    written = [0]
    render = chats.Chat.render

    def counting(self: chats.Chat, *args: Any, **kwargs: Any) -> str:
        text = render(self, *args, **kwargs)
        written[0] += len(text)
        return text

    monkeypatch.setattr(chats.Chat, "render", counting)
    counts = []
    for exchanges in (100, 400):
        written[0] = 0
        chat = [one for n in range(exchanges) for one in (user(f"question {n}"), assistant(f"answer {n}"))]
        found = learned(tokenizer, {"messages": chat})
        assert [text.strip(" ") for text in found] == [
            (f"answer {n} " if name == "llama2" else f"answer {n}") + FORMS[name].end for n in range(exchanges)
        ]
        counts.append(written[0])
    assert counts[1] < 4.5 * counts[0]


# ---- a template of one's own


def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    own = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    path = tmp_path / "own.jinja"
    path.write_text(own)
    tokenizer = load_tokenizer(save(FORMS["chatml"], tmp_path / "model"))
    use_template(tokenizer, path, {})
    assert learned(tokenizer, {"messages": CHAT[:2]})[-1] == "Hello!<|endoftext|>"
    # a checkpoint of the run has it: whoever reads that tokenizer writes the same chats
    save(FORMS["chatml"], tmp_path / "checkpoint")
    save_template(tokenizer, tmp_path / "checkpoint")
    again = load_tokenizer(tmp_path / "checkpoint")
    assert again.chat_template == own == AutoTokenizer.from_pretrained(tmp_path / "checkpoint").chat_template
    for text, sentence in (("{% for %}", "line 1, is no Jinja template"), (" \n", "is empty")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"data\.chat_template=.*{sentence}"):
            use_template(tokenizer, path, {})
    with pytest.raises(ValueError, match=r"data\.chat_template=.*cannot be read"):
        use_template(tokenizer, tmp_path / "absent", {})
    assert DataConfig().chat_template is None


# ---- what ends a sampled response


def ending_of(tokenizer: Any, text: str, **sampling: Any) -> tuple[str, str, str]:
    """How far a response goes, and why and how it reads."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ending = Ending(tokenizer, SamplingParams(len(ids), **sampling))
    for count in range(1, len(ids) + 1):
        reason = ending.reason(ids[:count])
        if reason is not None:
            return tokenizer.decode(ids[:count]), reason, ending.text(ids[:count], reason)
    raise AssertionError("it does not end")


def test_what_ends_a_response_is_named(tmp_path: Path) -> None:
    form = FORMS["qwen2.5"]
    eot = chat_tokenizer(form).convert_tokens_to_ids("<think>")
    tokenizer = load_tokenizer(save(form, tmp_path, [chat_tokenizer(form).eos_token_id, eot]))
    text = "a<|im_start|>b<think>c<|im_end|>d"
    assert ending_of(tokenizer, text) == ("a<|im_start|>b<think>", "eos:<think>", "ab")
    assert ending_of(tokenizer, "ab<|im_end|>c") == ("ab<|im_end|>", "eos", "ab")
    assert ending_of(tokenizer, text, ignore_eos=True) == (text, "length", "ab<think>cd")
    stop = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for given_as in ({"stop_token_ids": [stop]}, {"stop": ["<|im_start|>"]}):
        assert ending_of(tokenizer, text, **given_as) == ("a<|im_start|>", "stop:<|im_start|>", "a")
    assert ending_of(tokenizer, text, stop=["<|im_start|>b"]) == ("a<|im_start|>b", "stop:<|im_start|>b", "a")
    assert ending_of(tokenizer, "a<|im_start|>bcd", stop=["cd", "zz<|im_end|>"]) == (
        "a<|im_start|>bcd",
        "stop:cd",
        "ab",
    )
    with pytest.raises(ValueError, match=r"generation\.stop_token_ids has 100000, and the tokenizer has \d+ tokens"):
        Ending(tokenizer, SamplingParams(1, stop_token_ids=(100000,)))


@pytest.mark.parametrize("eos", [[1, 10**6], "2", [True], -1])
def test_generation_config_that_names_no_token_is_refused(tmp_path: Path, eos: Any) -> None:
    save(FORMS["chatml"], tmp_path, [])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ValueError, match=r"generation_config\.json says eos_token_id .* the tokenizer beside it has"):
        load_tokenizer(tmp_path)


# ---- anything

TEXTS = st.text(max_size=8) | st.sampled_from(["<|im_end|>", "<think>", "</think>\n", "\n\n", " ", "{{ x }}", "\ud800"])
VALUES = st.none() | st.booleans() | st.integers() | TEXTS | st.lists(st.none() | TEXTS, max_size=2)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
    optional={
        "content": TEXTS | VALUES | st.lists(st.fixed_dictionaries({"type": TEXTS, "text": VALUES}), max_size=2),
        "tool_calls": VALUES | st.lists(st.fixed_dictionaries({"function": VALUES}), max_size=2),
        "reasoning_content": VALUES,
        "weight": VALUES,
    },
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(FORMS)),
    st.lists(MESSAGES | VALUES, max_size=5),
    st.dictionaries(st.sampled_from(["tools", "chat_template_kwargs", "done"]), VALUES, max_size=2),
)
def test_any_chat_is_read_or_refused_in_a_sentence(name: str, messages: Any, fields: dict[str, Any]) -> None:
    tokenizer = TOKENIZERS.setdefault(name, chat_tokenizer(FORMS[name]))
    for record in ({"messages": messages, **fields}, {"prompt": messages, "response": "a", **fields}):
        try:
            pieces = pieces_of("record", record, tokenizer)
        except ValueError as error:
            assert str(error).startswith("record") and "\n" not in str(error)
        else:
            assert any(is_learned and ids for ids, is_learned in pieces)


TOKENIZERS: dict[str, Any] = {}
