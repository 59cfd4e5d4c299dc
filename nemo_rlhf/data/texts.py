"""Texts for supervised training: read, tokenised once, with a mask of what is learned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

from nemo_rlhf.data.chat_format import reply_end, response_ends, up_to_end
from nemo_rlhf.data.chats import check_end, read_chat
from nemo_rlhf.data.files import Source
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.prompts import encode_prompt
from nemo_rlhf.data.records import best, missing_field, total_reward
from nemo_rlhf.data.tokenizer import encode
from nemo_rlhf.data.turns import Piece, chat_pieces, last_turn
from nemo_rlhf.types import Text

TrainOn = Literal["response", "all"]
FIELDS = ("prompt", "messages", "text")


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
    """The pieces of a record in one of the forms of ``read_texts``: every stretch that is learned is one of them.

    What a response ends with is its first token of ``response_ends``: nothing behind it is a part of the response, and
    where it has none, ``reply_end`` is appended to the last one, unless the record was cut off.
    """
    if isinstance(record, dict) and record.get("prompt") is None and record.get("messages") is not None:
        chat = read_chat(f"{where}: messages", record["messages"], tokenizer, record)
        pieces, prompt = chat_pieces(chat), None
        if chat.messages[-1]["role"] != "assistant":
            return pieces
    else:
        pieces, prompt = _plain_pieces(where, record, tokenizer)
    last, _ = pieces[-1]  # every other form ends in what is learned
    if is_done(where, record) and (not last or last[-1] not in response_ends(tokenizer)):
        last.append(reply_end(tokenizer, prompt))
    return pieces


def scored_tokens(where: str, record: Any, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a record's prompt and its last response, up to the token that ends it: what a reward model scores,
    at the last of them. Of a chat only the last turn must be told apart.

    Raises:
        ValueError: as ``pieces_of``; a chat does not end in a turn of the assistant.
    """
    if not isinstance(record, dict):
        record = {"turns" if isinstance(record, (list, tuple)) else "text": record}
    if record.get("prompt") is not None and isinstance(record.get("response"), str) and record["response"]:
        ids, text = encode_prompt(record["prompt"], tokenizer, where, record)
        return (*ids, *encode_response(text, record["response"], tokenizer))
    if record.get("prompt") is None and record.get("messages") is not None:
        chat = read_chat(f"{where}: messages", record["messages"], tokenizer, record)
        (before, _), (response, _) = last_turn(chat)
        if not response or response[-1] not in response_ends(tokenizer):
            response.append(reply_end(tokenizer, None))
        return (*before, *response)
    pieces = pieces_of(where, {**record, "done": True}, tokenizer)  # it gets its end where it is scored, too
    return tuple(token for ids, _ in pieces for token in ids)


def encode_response(prompt: str, response: str, tokenizer: Any) -> list[int]:
    """Token ids of a response that was taken as text, with the token that ends it. Names of special tokens in it, which
    a policy may have spelled, are words; but the one that ended it may stand at its end."""
    for end in response_ends(tokenizer):
        response = response.removesuffix(tokenizer.decode([end]))
    return [*encode(tokenizer, response, start=False, split_special=True), reply_end(tokenizer, prompt)]


def _plain_pieces(where: str, record: Any, tokenizer: Any) -> tuple[list[Piece], str]:
    """The pieces of a record that is no chat, and how its text begins."""
    if isinstance(record, (list, tuple)):
        return _dialogue(where, record, tokenizer), str(record[0])
    if isinstance(record, str):
        return _whole_text(where, record, tokenizer), record
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a {type(record).__name__}, and must be a string, a list or an object.")
    if record.get("prompt") is not None:
        if record.get("response") is None:
            raise missing_field(where, record, ("response",))
        ids, text = encode_prompt(record["prompt"], tokenizer, where, record)
        response, _ = _learned(where, "response", record["response"], tokenizer)
        check_end(where, record["response"], [tokenizer.decode([end]) for end in response_ends(tokenizer)])
        return [(ids, False), (up_to_end(response, response_ends(tokenizer)), True)], text
    if record.get("turns") is not None:
        if not isinstance(record["turns"], (list, tuple)):
            raise ValueError(f'{where}: "turns" is a {type(record["turns"]).__name__}, and must be a list of texts.')
        return _dialogue(where, record["turns"], tokenizer), str(record["turns"][:1])
    if record.get("text") is not None:
        return _whole_text(where, record["text"], tokenizer), record["text"]
    raise missing_field(where, record, FIELDS)


def is_done(where: str, record: Any) -> bool:
    """Whether a record came to its end, as all do that do not say ``"done": false``: they were cut off."""
    done = record.get("done") if isinstance(record, dict) else None
    if done is not None and not isinstance(done, bool):
        raise ValueError(f'{where}: "done" is {done!r}, and must be true, or false where the text was cut off.')
    return done is not False


def _whole_text(where: str, text: Any, tokenizer: Any) -> list[Piece]:
    _check_text(where, "text", text)
    token_ids, ends = encode(tokenizer, text, start=True), response_ends(tokenizer)
    last = next((index for index in reversed(range(len(token_ids))) if token_ids[index] in ends), None)
    if last is not None and not tokenizer.decode(token_ids[last + 1 :]).strip():  # what a template writes behind it
        token_ids = token_ids[: last + 1]
    return [(token_ids, True)]


def _dialogue(where: str, turns: Sequence[Any], tokenizer: Any) -> list[Piece]:
    if not turns or len(turns) % 2:
        raise ValueError(f"{where} has {len(turns)} turns: a list must be prompt, output, prompt, output, ...")
    pieces: list[Piece] = []
    for index, turn in enumerate(turns):
        if index % 2:
            token_ids, _ = _learned(where, f"turn {index}", turn, tokenizer)
            response = up_to_end(token_ids, response_ends(tokenizer))
            pieces.append((response, True))
            if index + 1 < len(turns) and len(response) < len(token_ids):
                pieces.append((token_ids[len(response) :], False))
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
