"""``nemo-rlhf data``: what a file of records holds, what would be learned from it, and which records cannot be used.

No model is loaded. Without a tokenizer nothing heavy is: texts are then what people read, and lengths characters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from nemo_rlhf.cli.samples import visible
from nemo_rlhf.config.data import DataCommandConfig
from nemo_rlhf.data.files import locate_records
from nemo_rlhf.data.forms import Purpose, purpose_of
from nemo_rlhf.data.intake import WHAT, Intake
from nemo_rlhf.data.records import finite_reward, margin_of, rewards_of, score_of

EXIT_DONE, EXIT_REFUSED = 0, 2
MAX_CHARACTERS = 4000
BAR, NUM_BINS = 40, 10
_LONG = 1 << 40  # tokens: no text has so many
LEARNED = "bold green"

Shown = list[tuple[str, bool]]  # stretches of text, and whether they are learned


@dataclass
class Seen:
    """What was found: lengths of all prompts and of all texts, and the texts of the first record."""

    unit: str
    prompts: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    first: list[Shown] = field(default_factory=list)


def run_data(file: str, config: DataCommandConfig, purpose: Purpose | None, console: Console) -> int:
    """Say on ``console`` what ``file`` holds for ``purpose`` (None: what its first record is good for); the exit code.

    Raises:
        ValueError: there is no such file, or nothing in it can be read.
    """
    data = config.data
    intake = Intake(data.fields, "note", data.empty_turns == "drop")
    used = purpose or _guess(file, intake)
    directory = config.model.tokenizer or config.model.restore_from
    seen = _in_characters(file, used, intake) if directory is None else _in_tokens(file, used, intake, config)
    why = "" if purpose else " (so its first record says; --for=... chooses)"
    console.print(Text(f"{file}, read for {used}{why}:"))
    for form, number in intake.forms.most_common():
        console.print(Text(f"  {number} of the form: {form}"))
    if directory is None:
        console.print(
            Text(
                "\nWithout a tokenizer lengths are in characters, and no chat was tried on a template: name one with "
                "model.restore_from=DIR or model.tokenizer=DIR."
            )
        )
    for name, lengths in (("prompts", seen.prompts), ("whole texts", seen.texts)):
        if lengths:
            console.print(Text("\n".join(["", *_histogram(f"{seen.unit} of {len(lengths)} {name}", lengths)])))
    if num_long := sum(length > data.max_sequence_length for length in seen.texts if seen.unit == "tokens"):
        limit = f"data.max_sequence_length={data.max_sequence_length}"
        console.print(Text(f"\n{num_long} are longer than {limit}: training cuts them, or leaves them out."))
    for number, text in enumerate(seen.first):
        of = f", text {number + 1} of {len(seen.first)}" if len(seen.first) > 1 else ""
        console.print(Text(f"\nThe first {WHAT[used]}{of}, with what is learned in ⟦⟧:"))
        console.print(_marked(text))
    if not intake.refused:
        return EXIT_DONE
    verb = "are left out" if data.on_error == "skip" else "would be refused"
    console.print(Text(f"\n{len(intake.refused)} {verb}:"))
    for sentence in intake.refused:
        console.print(Text(f"  {visible(sentence)}"), soft_wrap=True)
    return EXIT_DONE if data.on_error == "skip" else EXIT_REFUSED


def _guess(file: str, intake: Intake) -> Purpose:
    for _, record in locate_records(file, "record"):
        if not isinstance(record, ValueError):
            return purpose_of(intake.renamed(record))
    return "sft"


def _in_characters(file: str, purpose: Purpose, intake: Intake) -> Seen:
    seen = Seen("characters")
    for where, record in intake.records(file, purpose):
        with intake.noted():
            texts = _texts(where, record, purpose)
            if purpose == "prompts":
                seen.prompts += [len("".join(text for text, _ in texts[0]))]
            else:
                _count(seen, [[(len(text), learned) for text, learned in one] for one in texts])
            seen.first = seen.first or texts
    return seen


def _count(seen: Seen, texts: Sequence[Sequence[tuple[int, bool]]]) -> None:
    """Add the lengths of one record's texts, of which each stretch has a length."""
    for text in texts:
        learned = [is_learned for _, is_learned in text]
        first = learned.index(True) if True in learned else len(text)
        seen.prompts += [sum(length for length, _ in text[:first])] if first or True in learned else []
        seen.texts.append(sum(length for length, _ in text))


def _texts(where: str, record: Any, purpose: Purpose) -> list[Shown]:
    """A record as people read it. Raises ValueError for what no tokenizer is needed to find."""
    if purpose == "prompts":
        if isinstance(record, Mapping):
            record = record["text"] if record.get("prompt") is None else record["prompt"]
        return [_prompt(where, record)]
    if purpose == "pairs":
        margin_of(where, record.get("margin", 0.0))
        return [_text(where, _side(record, name)) for name in ("chosen", "rejected")]
    if purpose == "scores":
        score_of(where, record)
    if purpose == "dialogues":
        given = rewards_of(where, record)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            finite_reward(where, value)
    return [_text(where, record)]


def _side(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    if record.get("prompt") is not None:
        return {"prompt": record["prompt"], "response": record[name]}
    return {"text" if isinstance(record[name], str) else "messages": record[name]}


def _text(where: str, record: Any) -> Shown:
    if isinstance(record, str):
        record = {"text": record}
    elif isinstance(record, (list, tuple)):
        record = {"turns": record}
    elif not isinstance(record, Mapping):
        raise ValueError(f"{where} is a {type(record).__name__}, and must be a string, a list or an object.")
    if record.get("prompt") is not None:
        prompt = [] if record["prompt"] == "" else _prompt(where, record["prompt"])
        return [*prompt, (_checked(where, "response", record.get("response")), True)]
    if record.get("messages") is not None:
        return _chat(record["messages"])
    if record.get("turns") is not None:
        turns = record["turns"]
        if not isinstance(turns, (list, tuple)) or not turns or len(turns) % 2:
            raise ValueError(f"{where}: turns must be a list of prompt, output, prompt, output, ...")
        return [
            (_checked(where, f"turn {index}", turn, may_be_empty=index % 2 == 0), index % 2 == 1)
            for index, turn in enumerate(turns)
        ]
    return [(_checked(where, "text", record.get("text")), True)]


def _prompt(where: str, prompt: Any) -> Shown:
    if isinstance(prompt, (list, tuple)) and prompt:
        return [(text, False) for text, _ in _chat([*prompt, {"role": "assistant", "content": ""}])][:-2]
    return [(_checked(where, "prompt", prompt), False)]


def _chat(messages: Sequence[Mapping[str, Any]]) -> Shown:
    shown: Shown = []
    for message in messages:
        content = message.get("content")
        said = "" if content is None else content if isinstance(content, str) else json.dumps(content, default=str)
        more = {name: value for name, value in message.items() if name not in ("role", "content", "weight")}
        said += f"\n{json.dumps(more, ensure_ascii=False, default=str)}" if more else ""
        shown += [(f"{message['role']}: ", False), (said, message["role"] == "assistant"), ("\n", False)]
    return shown


def _checked(where: str, what: str, text: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: the {what} is a {type(text).__name__}, and must be text.")
    if not text and not may_be_empty:
        raise ValueError(f"{where}: the {what} is empty.")
    return text


def _in_tokens(file: str, purpose: Purpose, intake: Intake, config: DataCommandConfig) -> Seen:
    """The same as training reads it: its readers, with the tokenizer."""
    from nemo_rlhf.convert.locate import tokenizer_directory
    from nemo_rlhf.data.dialogues import read_dialogues
    from nemo_rlhf.data.pairs import read_pairs
    from nemo_rlhf.data.prompts import read_prompts
    from nemo_rlhf.data.scores import read_scores
    from nemo_rlhf.data.texts import read_texts
    from nemo_rlhf.data.tokenizer import load_tokenizer, use_template

    tokenizer = load_tokenizer(config.model.tokenizer or tokenizer_directory(str(config.model.restore_from)))
    use_template(tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
    data, seen = config.data, Seen("tokens")
    how: dict[str, Any] = {"intake": intake}
    masks: list[list[tuple[Sequence[int], Sequence[bool]]]] = []
    try:
        if purpose == "prompts":
            prompts = read_prompts(file, tokenizer, data.max_prompt_length, **how)
            seen.prompts = [len(prompt.token_ids) for prompt in prompts]
            seen.first = [[(prompt.text, False)] for prompt in prompts[:1]]
            return seen
        limit = _LONG  # how long texts are is what is asked; training cuts them, or leaves them out
        if purpose == "sft":
            texts = read_texts(file, tokenizer, limit, data.train_on, **how)  # type: ignore[arg-type]
            masks = [[(text.token_ids, text.loss_mask)] for text in texts]
        elif purpose == "dialogues":
            dialogues = read_dialogues(file, tokenizer, limit, **how)
            masks = [[(dialogue.token_ids, dialogue.action_mask)] for dialogue in dialogues]
        elif purpose == "pairs":
            pairs = read_pairs(file, tokenizer, limit, **how)
            masks = [_both(pair.chosen, pair.rejected) for pair in pairs]
        else:
            scored = read_scores(file, tokenizer, limit, **how)
            masks = [[(one.token_ids, [False] * (len(one.token_ids) - 1) + [True])] for one in scored]
    except ValueError as error:
        if not intake.refused or "is left within" not in str(error):  # otherwise it only says that none is left
            intake.refused.append(str(error))
    for record in masks:
        stretches = [_stretches(ids, mask) for ids, mask in record]
        _count(seen, [[(len(ids), learned) for ids, learned in text] for text in stretches])
        seen.first = seen.first or [[(tokenizer.decode(ids), learned) for ids, learned in text] for text in stretches]
    if purpose == "scores":  # the score is read at the last token: where the prompt ends is not known any more
        seen.prompts = []
    return seen


def _both(chosen: Sequence[int], rejected: Sequence[int]) -> list[tuple[Sequence[int], Sequence[bool]]]:
    """Two texts, of which that is marked in which they differ."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return [(ids, [place >= shared for place in range(len(ids))]) for ids in (chosen, rejected)]


def _stretches(ids: Sequence[int], mask: Sequence[bool]) -> list[tuple[list[int], bool]]:
    result: list[tuple[list[int], bool]] = []
    for token, learned in zip(ids, mask, strict=True):
        if not result or result[-1][1] != learned:
            result.append(([], learned))
        result[-1][0].append(token)
    return result


def _marked(text: Shown) -> Text:
    """The text with its learned stretches in brackets; what would steer a terminal is shown, not obeyed."""
    marked = Text(overflow="fold")
    room = MAX_CHARACTERS
    for piece, learned in text:
        shown = "\n".join(visible(line) for line in piece[:room].split("\n")) + ("…" if len(piece) > room else "")
        marked.append(f"⟦{shown}⟧" if learned else shown, LEARNED if learned else "")
        room -= len(piece)
        if room <= 0:
            break
    return marked


def _histogram(title: str, lengths: Sequence[int]) -> list[str]:
    """Lines of text: how many lengths lie in each of a few equal ranges."""
    low, high = min(lengths), max(lengths)
    middle = sorted(lengths)[len(lengths) // 2]
    width = max(1, -(-(high - low + 1) // NUM_BINS))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    digits, most = len(str(high)), max(counts)
    lines = [f"{title}: {low} to {high}, half of them up to {middle}, {sum(lengths)} in all"]
    for index, count in enumerate(counts):
        start = low + index * width
        bar = "█" * (-(-count * BAR // most)) + " " if count else ""
        end = min(start + width - 1, high)
        to = f" to {end:>{digits}}" if width > 1 else ""
        lines.append(f"  {start:>{digits}}{to}  {bar}{count}")
    return lines
