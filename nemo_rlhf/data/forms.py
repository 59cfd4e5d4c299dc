"""The forms that records come in, and what each becomes for whoever reads it.

Readers know few forms: ``{"prompt", "response"}``, ``{"messages"}``, ``{"turns"}`` and ``{"text"}``, with "score",
"reward" or "rewards" beside them; ``{"prompt", "chosen", "rejected"}``, or the last two as whole chats or texts; and,
for prompts, ``{"prompt", ...metadata}``. Every form is a row of ``FORMS``, which are tried from the top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from nemo_rlhf.data.compared import compared, ranked, split_dialogue
from nemo_rlhf.data.messages import read_messages, reply_to
from nemo_rlhf.data.nearest import unknown_form

Purpose = Literal["sft", "prompts", "pairs", "scores", "dialogues"]
Record = dict[str, Any]
Placed = tuple[str, Any]

# Fields that say what the text is. All others mean the same beside every form: tools, margin, reward, done, ...
TEXTS = frozenset({"prompt", "response", "messages", "turns", "text", "chosen", "rejected"})
SCORED = frozenset({"scores", "dialogues"})
SINGLE = frozenset({"sft", "prompts", "scores", "dialogues"})  # what one text of each record is enough for
PAIR = frozenset({"pairs", "prompts"})
TEXT = SINGLE | PAIR
ONLY_PROMPTS = frozenset({"prompts"})
MARKER = "\n\nAssistant:"  # before what is compared in a dialogue of hh-rlhf


@dataclass(frozen=True)
class Form:
    """One row of ``FORMS``. ``fields``: that a record of this form has; ``serves``: the purposes it is enough for;
    ``become``: its records for one of them, each with what to add to its place; ``is_it``: what else must hold."""

    name: str
    fields: tuple[str, ...]
    serves: frozenset[str]
    become: Callable[[str, Record, str], list[tuple[str, Record]]]
    is_it: Callable[[Record], bool] = lambda record: True

    def matches(self, record: Record) -> bool:
        return all(record.get(name) is not None for name in self.fields) and self.is_it(record)


def as_known(where: str, record: Any, purpose: Purpose) -> tuple[str, list[Placed]]:
    """The name of a record's form, and what it becomes for ``purpose``: (place, record) pairs, mostly one.

    Raises:
        ValueError: names the place of a record that is of no form, of one that ``purpose`` has no use for, or that
            contradicts itself.
    """
    if not isinstance(record, dict):
        if purpose in ("pairs", "scores"):
            wanted = '"chosen" and "rejected"' if purpose == "pairs" else '"score"'
            raise ValueError(f"{where} is a {type(record).__name__}, and must be an object with {wanted}.")
        if purpose == "prompts" and not isinstance(record, str):
            raise ValueError(
                f'{where} is a {type(record).__name__}, and must be a string or an object with "prompt" or "text".'
            )
        return "text" if isinstance(record, str) else "turns", [(where, record)]
    if purpose == "prompts" and (name := next((n for n in ("prompt", "text") if record.get(n) is not None), None)):
        return _named_prompt(where, record, name)
    found = [form for form in FORMS if form.matches(record)]
    form = next((form for form in found if purpose in form.serves), None)
    if form is None:
        raise (_of_no_use(where, record, found[0], purpose) if found else None) or unknown_form(where, record, purpose)
    return form.name, [
        (where + place, _read_chat(where, _beside(form, record, one, purpose)))
        for place, one in form.become(where, record, purpose)
    ]


def purpose_of(record: Any) -> Purpose:
    """What a record is most likely meant for."""
    if not isinstance(record, dict):
        return "sft"
    serves = [form.serves for form in FORMS if form.matches(record) and form.serves not in (TEXT, ONLY_PROMPTS)]
    if any("pairs" in one for one in serves):
        return "pairs"
    if any(record.get(name) is not None for name in ("reward", "rewards")):
        return "dialogues"
    if record.get("score") is not None or SCORED in serves or (record.get("label") is not None and serves):
        return "scores"
    is_prompt = any(record.get(name) is not None for name in ("prompt", "input", "instruction"))
    return "prompts" if is_prompt and not serves else "sft"


def _named_prompt(where: str, record: Record, name: str) -> tuple[str, list[Placed]]:
    if isinstance(record[name], (list, tuple)) and record[name]:
        others = {other: value for other, value in record.items() if other != name}
        record = _with_switch(_read_chat(where, {**others, "prompt": record[name]}))
    return name, [(where, record)]


def _beside(form: Form, record: Record, one: Record, purpose: str) -> Record:
    """``one`` with what stands beside it: the rest of the record, which is the metadata of a prompt."""
    if purpose == "prompts":
        became = [name for name in form.fields if record[name] == one["prompt"]]
        return _with_switch({**{name: value for name, value in record.items() if name not in became}, **one})
    kept = {name: value for name, value in record.items() if name not in TEXTS and value is not None}
    return {**_with_switch(kept), **one}


def _with_switch(record: Record) -> Record:
    """A record with verl's ``enable_thinking`` where the chat template reads it."""
    if not isinstance(record.get("enable_thinking"), bool) or record.get("chat_template_kwargs") is not None:
        return record
    return {**record, "chat_template_kwargs": {"enable_thinking": record["enable_thinking"]}}


def _read_chat(where: str, one: Record) -> Record:
    """``one`` with the messages of its prompt as chat templates take them."""
    if isinstance(one.get("prompt"), (list, tuple)):
        one = {**one, "prompt": read_messages(f"{where}: the prompt", one["prompt"])}
    return one


def _of_no_use(where: str, record: Record, form: Form, purpose: str) -> ValueError | None:
    """What to say of a record of ``form`` when it is no use for ``purpose``; None: that it lacks a field."""
    if not form.serves:
        return ValueError(f"{where} is {form.name}, which no command learns from.")
    if purpose == "pairs" and form.serves & SCORED:
        has_score = any(record.get(name) is not None for name in ("score", "reward", "label"))
        if not has_score and "completions" not in form.fields:
            return None
        return _scored(where)
    if "pairs" in form.serves and purpose == "scores":
        return ValueError(
            f"{where} compares two responses, and reward_model.loss=regression learns from scores: give one response "
            'and its "score", or set reward_model.loss=bradley_terry.'
        )
    if "pairs" in form.serves:
        field = "response" if record.get("prompt") else "text" if isinstance(record.get("chosen"), str) else "messages"
        hint = f"; to learn what was chosen, set data.fields={{{field}: chosen}}" if record.get("chosen") else ""
        return ValueError(f"{where} compares responses ({form.name}), of which not all are to be learned{hint}.")
    return None


def _scored(where: str) -> ValueError:
    return ValueError(
        f"{where} is a scored response, and reward_model.loss=bradley_terry learns from compared ones: set "
        "reward_model.loss=regression."
    )


def _alone(one: Record) -> list[tuple[str, Record]]:
    return [("", one)]


def _demonstration(prompt: str, reply: str) -> Callable[[str, Record, str], list[tuple[str, Record]]]:
    def become(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
        given = record[prompt]
        return _alone({"prompt": given} if purpose == "prompts" else reply_to(where, given, record[reply]))

    return become


def _unpaired(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    if purpose == "sft" and not record["label"]:
        raise ValueError(
            f"{where} has the label false: it shows what not to say. data.on_error=skip leaves such records out."
        )
    reply = "completion" if record.get("completion") is not None else "response"
    ((_, one),) = _demonstration("prompt", reply)(where, record, purpose)
    is_scored = any(record.get(name) is not None for name in ("score", "reward", "rewards"))
    return _alone(one if is_scored or purpose not in SCORED else {**one, "reward": float(record["label"])})


def _chat(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    name = next(name for name in ("messages", "conversations", "conversation") if record.get(name) is not None)
    messages = read_messages(f"{where}: {name}", record[name])
    if record.get("system") and messages[0]["role"] == "system" and messages[0].get("content") != record["system"]:
        raise ValueError(f'{where} has "system", and {name} that begin with another system message: keep one of them.')
    if record.get("system") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": record["system"]}, *messages]
    mask = record.get("mask")  # NeMo-Aligner's: who is not learned
    if name == "conversations" and isinstance(mask, str) and mask.lower() not in ("", "user", "human"):
        raise ValueError(f'{where} has "mask": {mask!r}, and only what the assistant says can be learned.')
    one: Record = {"messages": messages}
    if isinstance(record.get("functions"), list) and record.get("tools") is None:  # OpenAI's older word
        one["tools"] = [{"type": "function", "function": function} for function in record["functions"]]
    if purpose == "prompts":
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise ValueError(f"{where}: {name} have no turn but the assistant's, so nothing to answer.")
        one.pop("messages")
        return _alone({**one, "prompt": messages})
    return _alone(one)


def _alpaca(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    prompt: Any = record["instruction"]
    if record.get("input"):
        if not isinstance(prompt, str) or not isinstance(record["input"], str):
            raise ValueError(f"{where}: instruction and input must both be text.")
        prompt = f"{prompt}\n\n{record['input']}"
    if record.get("system") or record.get("history"):
        history = record.get("history") or []
        if not isinstance(history, list) or not all(
            isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in history
        ):
            raise ValueError(f'{where}: "history" must be a list of [question, answer].')
        chat = [("system", record["system"])] if record.get("system") else []
        for question, answer in history:
            chat += [("user", question), ("assistant", answer)]
        prompt = [{"role": role, "content": content} for role, content in [*chat, ("user", prompt)]]
    one = {"prompt": prompt}
    return _alone(one if purpose == "prompts" else {**one, "response": record["output"]})


def _attributes(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    label = record["label"]
    if len(label) != 1:
        raise ValueError(
            f'{where} has {len(label)} values in "label", and a reward model learns one: choose it with '
            "data.fields={score: label.0}, or another number."
        )
    return _alone({"text": record["text"], "reward": label[0]})


def _as_it_is(name: str) -> Callable[[str, Record, str], list[tuple[str, Record]]]:
    return lambda where, record, purpose: _alone({"prompt" if purpose == "prompts" else name: record[name]})


def _halves(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    if purpose == "pairs" and record.get("score") is not None:
        raise _scored(where)
    if purpose == "pairs" and not isinstance(record["text"], str):
        raise ValueError(f"{where}: the text is a {type(record['text']).__name__}, and must be text.")
    return _alone({"text": record["text"]})  # two of which make a pair, if it is for pairs


def _pair(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    return _alone(compared(where, record.get("prompt"), record["chosen"], record["rejected"], purpose))


def _hh(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    return _alone(compared(where, *split_dialogue(record["chosen"], record["rejected"], MARKER), purpose))


def _openai_pair(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    given = record["input"]
    prompt = given.get("messages") if isinstance(given, dict) else given
    one = compared(where, prompt, record["preferred_output"], record["non_preferred_output"], purpose)
    tools = given.get("tools") if isinstance(given, dict) else None
    return _alone({**one, "tools": tools} if tools else one)


def _two_responses(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    preference = record["overall_preference"]
    if isinstance(preference, bool) or not isinstance(preference, (int, float)) or not preference:
        raise ValueError(
            f"{where} has the preference {preference!r}, which says of neither response that it is better."
        )
    sides = (record["response1"], record["response2"])
    return _alone(compared(where, record["context"], *(sides if preference < 0 else sides[::-1]), purpose))


def _ultrafeedback(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    scored = [(one.get("overall_score"), one.get("response")) for one in record["completions"]]
    return ranked(where, record["instruction"], scored, purpose, "overall_score")


def _nemo_rl(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    def score(rank: Any) -> Any:
        return -rank if isinstance(rank, (int, float)) and not isinstance(rank, bool) else rank

    scored = [(score(one["rank"]), one.get("completion")) for one in record["completions"]]
    return ranked(where, record["context"], scored, purpose, "rank")


def _each_has(name: str) -> Callable[[Record], bool]:
    def is_it(record: Record) -> bool:
        given = record["completions"]
        return isinstance(given, list) and bool(given) and all(isinstance(one, dict) and name in one for one in given)

    return is_it


def _is_hh(record: Record) -> bool:
    sides = (record["chosen"], record["rejected"])
    return not record.get("prompt") and all(isinstance(side, str) and MARKER in side for side in sides)


def _has_label(record: Record) -> bool:
    has_reply = any(record.get(name) is not None for name in ("completion", "response"))
    return has_reply and isinstance(record["label"], (bool, int, float)) and record["label"] in (0, 1)


def _has_attributes(record: Record) -> bool:
    return isinstance(record["label"], list) and record.get("score") is None and record.get("reward") is None


def _refused(where: str, record: Record, purpose: str) -> list[tuple[str, Record]]:
    raise AssertionError("a form that serves nothing was asked for")


FORMS = (
    Form("OpenAI preference", ("input", "preferred_output", "non_preferred_output"), PAIR, _openai_pair),
    Form("NeMo-RL ranked completions", ("context", "completions"), PAIR, _nemo_rl, _each_has("rank")),
    Form("HelpSteer preference", ("context", "response1", "response2", "overall_preference"), PAIR, _two_responses),
    Form(
        "UltraFeedback",
        ("instruction", "completions"),
        frozenset({"pairs", "prompts", "scores", "dialogues"}),
        _ultrafeedback,
        _each_has("overall_score"),
    ),
    Form("stepwise supervision", ("prompt", "completions", "labels"), frozenset(), _refused),
    Form("hh-rlhf", ("chosen", "rejected"), PAIR, _hh, _is_hh),
    Form("preference with prompt", ("prompt", "chosen", "rejected"), PAIR, _pair),
    Form("preference of whole chats or texts", ("chosen", "rejected"), PAIR, _pair),
    Form("unpaired preference", ("prompt", "label"), SINGLE, _unpaired, _has_label),
    Form("prompt and response", ("prompt", "response"), SINGLE, _demonstration("prompt", "response")),
    Form("prompt and completion", ("prompt", "completion"), SINGLE, _demonstration("prompt", "completion")),
    Form("chat messages", ("messages",), SINGLE, _chat),
    Form("ShareGPT chat", ("conversations",), SINGLE, _chat),
    Form("ShareGPT chat", ("conversation",), SINGLE, _chat, lambda record: isinstance(record["conversation"], list)),
    Form("turns", ("turns",), frozenset({"sft", "dialogues", "scores"}), _as_it_is("turns")),
    Form("Alpaca", ("instruction", "output"), SINGLE, _alpaca),
    Form("input and output", ("input", "output"), SINGLE, _demonstration("input", "output")),
    Form("text with attributes", ("text", "label"), SCORED, _attributes, _has_attributes),
    Form("text", ("text",), TEXT, _halves),
    Form("instruction", ("instruction",), ONLY_PROMPTS, _as_it_is("instruction")),
    Form("input", ("input",), ONLY_PROMPTS, _as_it_is("input")),
    Form("tokenised text", ("input_ids",), frozenset(), _refused),
)
