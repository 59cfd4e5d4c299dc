"""Texts for supervised training: read, tokenised once, with a mask of what is learned."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal

from nemo_rlhf.data.files import Source
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.prompts import encode_prompt
from nemo_rlhf.data.records import best, missing_field, total_reward
from nemo_rlhf.data.tokenizer import encode, render_chat
from nemo_rlhf.types import Text

TrainOn = Literal["response", "all"]
FIELDS = ("prompt", "messages", "text")
# Templates mark the assistant's tokens with {% generation %} ... {% endgeneration %}, if they mark them at all.
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

Piece = tuple[list[int], bool]  # token ids and whether they are learned


def read_texts(
    source: Source,
    tokenizer: Any,
    max_sequence_length: int,
    train_on: TrainOn,
    *,
    top_percent: float = 100.0,
    intake: Intake | None = None,
) -> list[Text]:
    """Texts from a file, a directory, a hub or a sequence of records (``locate_records``), taken in by ``intake``.

    A record is of a form of ``data.forms``, which becomes one of
    - ``{"prompt", "response"}``: prompt (a string or chat messages) and response are tokenised separately, as they are
      in a rollout; the response is learned, EOS at its end included;
    - ``{"messages"}``: a chat in the tokenizer's template; the assistant's turns are learned;
    - ``[prompt, output, prompt, output, ...]``, or that as ``{"turns"}``: a dialogue without template; the outputs are
      learned, with a last EOS;
    - ``{"text"}`` or a string: everything is learned, with EOS at the end.

    ``top_percent``: below 100, only this best share of the records is read, by the "reward" or "rewards" that each must
    then have. ``train_on``: "all" learns every token of every form. The first token of a text is never learned, as
    nothing precedes it. Longer than ``max_sequence_length`` tokens: what precedes the last learned stretch is cut at
    its start (BOS stays), then that stretch at its end; one warning says how many texts lost what.
    Raises ValueError, which names the places, for records that are none of these or have nothing to learn.
    """
    if max_sequence_length < 2:
        raise ValueError(f"data.max_sequence_length is {max_sequence_length}: it must be at least 2.")
    intake = intake or Intake()
    taken: list[tuple[Text, bool, bool]] = []
    totals: list[float] = []
    for where, record in intake.records(source, "sft"):
        with intake.noted():
            total = total_reward(where, record) if top_percent < 100 else 0.0
            token_ids, learned = _join(pieces_of(where, record, tokenizer))
            token_ids, learned, cut_prompt, cut_response = _fit(token_ids, learned, max_sequence_length, tokenizer)
            mask = learned if train_on == "response" else [True] * len(token_ids)
            mask = [False, *mask[1:]]
            if not any(mask):
                raise ValueError(f"{where} has nothing to learn.")
            taken.append((Text(tuple(token_ids), tuple(mask)), cut_prompt, cut_response))
            totals.append(total)
    taken = best(taken, totals, top_percent)
    texts = [text for text, _, _ in taken]
    num_cut_prompts, num_cut_responses = sum(cut for _, cut, _ in taken), sum(cut for _, _, cut in taken)
    if num_cut_prompts or num_cut_responses:
        warnings.warn(
            f"Of {len(texts)} texts, {num_cut_prompts} lost the start of their prompt and {num_cut_responses} the end "
            f"of their response to data.max_sequence_length={max_sequence_length}.",
            stacklevel=2,
        )
    return texts


def pieces_of(where: str, record: Any, tokenizer: Any) -> list[Piece]:
    """The pieces of a record in one of the forms of ``read_texts``: every stretch that is learned is one of them."""
    if isinstance(record, (list, tuple)):
        pieces = _dialogue(where, record, tokenizer)
    elif isinstance(record, str):
        pieces = _whole_text(where, record, tokenizer)
    elif not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, and must be a string, a list or an object.")
    elif record.get("prompt") is not None:
        if record.get("response") is None:
            raise missing_field(where, record, ("response",))
        pieces = _prompt_and_response(where, record["prompt"], record["response"], tokenizer)
    elif record.get("messages") is not None:
        return _chat(f"{where}: messages", record["messages"], tokenizer)
    elif record.get("turns") is not None:
        if not isinstance(record["turns"], (list, tuple)):
            raise ValueError(f'{where}: "turns" is a {type(record["turns"]).__name__}, and must be a list of texts.')
        pieces = _dialogue(where, record["turns"], tokenizer)
    elif record.get("text") is not None:
        pieces = _whole_text(where, record["text"], tokenizer)
    else:
        raise missing_field(where, record, FIELDS)
    last, _ = pieces[-1]  # every form ends in what is learned
    if is_done(where, record) and (not last or last[-1] != tokenizer.eos_token_id):
        last.append(tokenizer.eos_token_id)
    return pieces


def is_done(where: str, record: Any) -> bool:
    """Whether a record came to its end, as all do that do not say ``"done": false``: they were cut off."""
    done = record.get("done") if isinstance(record, dict) else None
    if done is not None and not isinstance(done, bool):
        raise ValueError(f'{where}: "done" is {done!r}, and must be true, or false where the text was cut off.')
    return done is not False


def _prompt_and_response(where: str, prompt: Any, response: Any, tokenizer: Any) -> list[Piece]:
    return [(encode_prompt(prompt, tokenizer, where)[0], False), _learned(where, "response", response, tokenizer)]


def _whole_text(where: str, text: Any, tokenizer: Any) -> list[Piece]:
    _check_text(where, "text", text)
    return [(encode(tokenizer, text, start=True), True)]


def _dialogue(where: str, turns: Sequence[Any], tokenizer: Any) -> list[Piece]:
    if not turns or len(turns) % 2:
        raise ValueError(f"{where} has {len(turns)} turns: a list must be prompt, output, prompt, output, ...")
    pieces: list[Piece] = []
    for index, turn in enumerate(turns):
        if index % 2:
            pieces.append(_learned(where, f"turn {index}", turn, tokenizer))
        elif isinstance(turn, str):
            pieces.append((encode(tokenizer, turn, start=index == 0), False))
        else:
            raise ValueError(f"{where}: turn {index} is a {type(turn).__name__}, and must be text.")
    return pieces


def _learned(where: str, what: str, text: Any, tokenizer: Any) -> Piece:
    _check_text(where, what, text)
    return encode(tokenizer, text, start=False), True


def _check_text(where: str, what: str, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{where}: the {what} is a {type(text).__name__}, and must be text.")
    if not text:
        raise ValueError(f"{where}: the {what} is empty.")


def _chat(where: str, messages: Any, tokenizer: Any) -> list[Piece]:
    """A chat in the tokenizer's template; the assistant's turns are learned."""
    whole = render_chat(tokenizer, messages, where, generation_prompt=False)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} have no turn of the assistant to learn.")
    is_marked = GENERATION_MARK.search(tokenizer.get_chat_template()) is not None
    spans = _marked_turns(messages, tokenizer) if is_marked else _found_turns(where, messages, whole, tokenizer)
    pieces: list[Piece] = []
    done = 0
    for start, end in spans:
        pieces.append((encode(tokenizer, whole[done:start], start=False), False))
        turn = encode(tokenizer, whole[start:end], start=False)
        pieces.extend([(turn, True)] if is_marked else _up_to_eos(turn, tokenizer.eos_token_id))
        done = end
    pieces.append((encode(tokenizer, whole[done:], start=False), False))
    return pieces


def _marked_turns(messages: Sequence[Any], tokenizer: Any) -> list[tuple[int, int]]:
    """Where the template's marks say that the assistant speaks, in characters.

    apply_chat_template(return_assistant_tokens_mask=True) has these too, but its mask is wrong where a stretch begins
    or ends in a blank that belongs to no token.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # annotated there as str
        [list(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    _, spans_of_chats = rendered
    return spans_of_chats[0]


def _found_turns(where: str, messages: Sequence[Any], whole: str, tokenizer: Any) -> list[tuple[int, int]]:
    """The same without marks: a turn is what the chat gains by it, after the header that a rollout begins with."""
    return [
        (
            _border(where, messages, index, whole, tokenizer, generation_prompt=True),
            _border(where, messages, index + 1, whole, tokenizer, generation_prompt=False),
        )
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def _border(
    where: str, messages: Sequence[Any], num_messages: int, whole: str, tokenizer: Any, *, generation_prompt: bool
) -> int:
    """How many characters of ``whole`` the first ``num_messages`` messages take."""
    part = render_chat(tokenizer, messages[:num_messages], where, generation_prompt=generation_prompt)
    if not whole.startswith(part):
        raise ValueError(
            f"{where}: the chat template writes message {num_messages - 1} differently when more follow, so the "
            "assistant's tokens cannot be told apart: mark them in the template with {% generation %}, or give prompt "
            "and response."
        )
    return len(part)


def _up_to_eos(token_ids: list[int], eos: int) -> list[Piece]:
    """A turn is learned up to its EOS; what the template writes behind that is never generated, so never learned."""
    if eos not in token_ids:
        return [([*token_ids, eos], True)]
    end = len(token_ids) - token_ids[::-1].index(eos)
    return [(token_ids[:end], True), (token_ids[end:], False)]


def _join(pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    token_ids = [token for ids, _ in pieces for token in ids]
    return token_ids, [learned for ids, learned in pieces for _ in ids]


def _fit(
    token_ids: list[int], learned: list[bool], limit: int, tokenizer: Any
) -> tuple[list[int], list[bool], bool, bool]:
    """Both cut to ``limit`` tokens, and whether the prompt and whether the response lost tokens."""
    if len(token_ids) <= limit or not any(learned):
        return token_ids[:limit], learned[:limit], False, False
    end = len(learned) - learned[::-1].index(True)
    start = end  # of the last learned stretch
    while start > 0 and learned[start - 1]:
        start -= 1
    # One token stays in front of the stretch, BOS if there is one, so that its first token has a predecessor.
    has_bos = token_ids[0] == tokenizer.bos_token_id
    head = min(start, 1)
    room = max(limit - (end - start), head)
    cut_prompt = start > room
    if cut_prompt:
        first = start - room
        if has_bos:
            token_ids, learned = [token_ids[0], *token_ids[first + 1 :]], [False, *learned[first + 1 :]]
        else:
            token_ids, learned = token_ids[first:], learned[first:]
        end -= first
    return token_ids[:limit], learned[:limit], cut_prompt, end > limit
