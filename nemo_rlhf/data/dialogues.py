"""Scored dialogues for offline reinforcement learning: read and tokenised once, with a reward for each action."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from nemo_rlhf.data.files import Source, read_records
from nemo_rlhf.data.intake import Intake
from nemo_rlhf.data.records import finite_reward, rewards_of
from nemo_rlhf.data.texts import Piece, is_done, pieces_of
from nemo_rlhf.types import Dialogue

TooLong = Literal["truncate", "refuse"]


def read_dialogues(
    source: Source,
    tokenizer: Any,
    max_sequence_length: int,
    *,
    rewards: Sequence[Any] | None = None,
    too_long: TooLong = "truncate",
    intake: Intake | None = None,
) -> list[Dialogue]:
    """Dialogues from a file, a directory, a hub or a sequence of records (``locate_records``), taken in by ``intake``.

    A record is ``{"turns": [prompt, output, prompt, output, ...], "rewards"}``, or one of the forms of ``read_texts``
    with "reward" or "rewards" beside it; what is learned there are the agent's tokens here. ``rewards`` gives those of
    a sequence of records that have none themselves. They are one number for the whole dialogue, a list of one for each
    of the agent's turns, or a list of one for each of its tokens; a number falls on the last token of what it is for.
    ``"done": false`` in a record says that it was cut off before its end (a limit on turns or on length).

    ``too_long``: what becomes of a dialogue of more than ``max_sequence_length`` tokens. "truncate" takes whole turns
    from its start (a first token that is BOS stays) and leaves out a dialogue whose last turn alone is too long; one
    warning says how many. "refuse" raises.

    Raises:
        ValueError: names the records that are none of these, have no or the wrong number of rewards, or one that is
            not a finite number.
    """
    intake = intake or Intake()
    dialogues = []
    num_all = num_cut = num_lost = 0
    for where, record in intake.records(source if rewards is None else _rewarded(source, rewards), "dialogues"):
        with intake.noted():
            given = rewards_of(where, record)
            pieces = _pieces(where, record, tokenizer)
            scored = _score(where, pieces, given)
            done = is_done(where, record)
            if sum(len(ids) for ids, _ in pieces) > max_sequence_length:
                if too_long == "refuse":
                    raise ValueError(
                        f"{where} has {sum(len(ids) for ids, _ in pieces)} tokens and data.max_sequence_length is "
                        f"{max_sequence_length}: raise the limit, shorten it, or set data.too_long=truncate."
                    )
                pieces, scored = _shorten(pieces, scored, max_sequence_length, tokenizer)
                num_cut, num_lost = num_cut + bool(pieces), num_lost + (not pieces)
            num_all += 1
            if pieces:
                dialogues.append(_join(pieces, scored, done))
    if num_cut or num_lost:
        warnings.warn(
            f"Of {num_all} dialogues, {num_cut} lost their first turns to data.max_sequence_length="
            f"{max_sequence_length}, and {num_lost} were left out because their last turn alone is longer.",
            stacklevel=2,
        )
    if not dialogues:
        raise ValueError(f"No dialogue is left within data.max_sequence_length={max_sequence_length}: raise it.")
    return dialogues


def _rewarded(source: Source, rewards: Sequence[Any]) -> list[Any]:
    """The records of ``source`` with these rewards in the place of their own."""
    records = [record for _, record in read_records(source, "dialogue")]
    if len(rewards) != len(records):
        raise ValueError(
            f"There are {len(records)} samples and {len(rewards)} rewards: give one reward, or list, a sample."
        )
    result = []
    for record, given in zip(records, rewards, strict=True):
        fields = record
        if isinstance(record, (str, list, tuple)):
            fields = {"text" if isinstance(record, str) else "turns": record}
        if isinstance(fields, dict):
            own = {name: value for name, value in fields.items() if name not in ("reward", "rewards")}
            fields = {**own, "rewards" if isinstance(given, (list, tuple)) else "reward": given}
        result.append(fields)
    return result


def standardise(dialogues: Sequence[Dialogue], *others: Sequence[Dialogue]) -> list[list[Dialogue]]:
    """Both with rewards scaled so that the totals of ``dialogues`` have standard deviation 1; and mean 0, as in trlX,
    where every reward falls on a dialogue's last action. Elsewhere a shift would reward longer dialogues, or shorter.

    Warns, and leaves them as they are, where all totals are equal: there is nothing to learn from them.
    """
    totals = [sum(dialogue.rewards) for dialogue in dialogues]
    mean = sum(totals) / len(totals)
    deviation = math.sqrt(sum((total - mean) ** 2 for total in totals) / len(totals))
    if deviation <= 1e-12 * max(1.0, abs(mean)):
        warnings.warn(f"All {len(totals)} dialogues have the same reward: there is nothing to learn.", stacklevel=2)
        mean, deviation = 0.0, 1.0
    is_sparse = not any(any(d.rewards[: _last_action(d)]) for d in dialogues)
    shift = mean if is_sparse else 0.0
    return [[_scaled(dialogue, shift, deviation) for dialogue in group] for group in (dialogues, *others)]


def _last_action(dialogue: Dialogue) -> int:
    return max(index for index, is_action in enumerate(dialogue.action_mask) if is_action)


def _scaled(dialogue: Dialogue, shift: float, deviation: float) -> Dialogue:
    rewards = list(dialogue.rewards)
    rewards[_last_action(dialogue)] -= shift
    return replace(dialogue, rewards=tuple(reward / deviation for reward in rewards))


def _pieces(where: str, record: Any, tokenizer: Any) -> list[Piece]:
    pieces = [piece for piece in pieces_of(where, record, tokenizer) if piece[0]]
    if pieces[0][1]:  # the first token has no state before it
        (ids, _), *others = pieces
        pieces = [(ids[:1], False), *([(ids[1:], True)] if ids[1:] else []), *others]
    if not any(is_action for _, is_action in pieces):
        raise ValueError(f"{where} has no token of the agent after its first: there is nothing to learn.")
    return pieces


def _score(where: str, pieces: Sequence[Piece], given: Any) -> list[list[float]]:
    """Rewards of each piece's tokens."""
    scored = [[0.0] * len(ids) for ids, _ in pieces]
    turns = [index for index, (_, is_action) in enumerate(pieces) if is_action]
    if not isinstance(given, (list, tuple)):
        scored[turns[-1]][-1] = finite_reward(where, given)
        return scored
    values = [finite_reward(where, value) for value in given]
    num_tokens = sum(len(pieces[turn][0]) for turn in turns)
    if len(values) == len(turns):
        for turn, value in zip(turns, values, strict=True):
            scored[turn][-1] = value
    elif len(values) == num_tokens:
        for turn in turns:
            scored[turn] = values[: len(scored[turn])]
            values = values[len(scored[turn]) :]
    else:
        raise ValueError(
            f"{where} has {len(values)} rewards, and {len(turns)} turns and {num_tokens} tokens of the agent (EOS "
            "included): give one number, one a turn or one a token."
        )
    return scored


def _shorten(
    pieces: list[Piece], scored: list[list[float]], limit: int, tokenizer: Any
) -> tuple[list[Piece], list[list[float]]]:
    """Without as many turns at the start as do not fit, both sides' together; nothing where the last does not fit."""
    has_bos = pieces[0][0][0] == tokenizer.bos_token_id
    room = limit - has_bos - sum(len(ids) for ids, _ in pieces)
    first = 0
    for index, (_, is_action) in enumerate(pieces):
        if room >= 0:
            break
        if is_action:
            room += sum(len(ids) for ids, _ in pieces[first : index + 1])
            first = index + 1
    pieces, scored = pieces[first:], scored[first:]
    if room < 0 or not any(is_action for _, is_action in pieces) or pieces[0][1]:
        return [], []
    if has_bos:
        pieces, scored = [([tokenizer.bos_token_id], False), *pieces], [[0.0], *scored]
    return pieces, scored


def _join(pieces: Sequence[Piece], scored: Sequence[Sequence[float]], done: bool) -> Dialogue:
    return Dialogue(
        token_ids=tuple(token for ids, _ in pieces for token in ids),
        action_mask=tuple(is_action for ids, is_action in pieces for _ in ids),
        rewards=tuple(reward for rewards in scored for reward in rewards),
        done=done,
    )
