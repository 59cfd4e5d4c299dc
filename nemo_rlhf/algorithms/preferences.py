"""The preference store as all ranks of a run have it: rank 0 alone speaks to it, and every rank hears the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from nemo_rlhf.data.prompts import encode_prompt
from nemo_rlhf.parallel import state


class OutOfReach(Exception):
    """The store does not answer; training goes on without it."""


class Comparison(Protocol):
    """What one annotator said: ``verdict`` is "first", "second", "tie" or "both_bad", of ``answers``. ``metadata`` of
    the pair has "messages" where the prompt was a chat, and perhaps a "margin"."""

    id: int
    step: int
    prompt: str
    answers: tuple[str, str]
    verdict: str
    annotator: str
    simulated: bool
    metadata: Mapping[str, Any]


class PreferenceStore(Protocol):
    """This run's part of the store, on rank 0. Everything raises OutOfReach."""

    def ask(self, step: int, questions: Sequence[dict[str, Any]], most: int) -> int:
        """Add the first ``most`` of those pairs to compare ("key", "prompt", "messages" of a chat or None, "answers",
        "priority", "metadata") that the store takes, and warn of others; how many were not there yet."""
        ...

    def fingerprint(self) -> str:
        """Tells this run's part of this very store from any other, whose comparisons have other numbers."""
        ...

    def may_grow(self) -> bool:
        """Whether comparisons may come without new questions: pairs wait for answers, or answers can be taken back."""
        ...

    def settled(self) -> list[int]:
        """Numbers of all comparisons that nobody can take back any more."""
        ...

    def read(self, numbers: Sequence[int]) -> Sequence[Comparison]:
        """These comparisons, in this order."""
        ...

    def report(self, **refresh: Any) -> None:
        """Show those who look after the annotators how a refresh went."""
        ...


class SharedStore:
    def __init__(self, store: PreferenceStore | None) -> None:
        """``store``: on rank 0, elsewhere None."""
        self._store = store

    def call(self, on_rank_zero: Callable[[PreferenceStore], Any]) -> Any:
        """What ``on_rank_zero`` gives there, on every rank; None and a warning where the store does not answer.

        Raises:
            ValueError: it does, on rank 0; then all ranks do, in the same words.
        """
        result, away, wrong = None, "", ""
        if self._store is not None:
            try:
                result = on_rank_zero(self._store)
            except OutOfReach as error:
                away = str(error)
            except ValueError as error:
                wrong = str(error)
        result, away, wrong = state.share_object(state.gather_objects((result, away, wrong))[0])
        if wrong:
            raise ValueError(wrong)
        if away:
            warnings.warn(
                f"The preference store does not answer, and training goes on without it: {away}", stacklevel=2
            )
        return result


def as_record(one: Comparison, tokenizer: Any) -> dict[str, Any]:
    """Plain data, with "chosen" and "rejected" None where nobody was preferred.

    "prompt" is what rewards get: of a chat, what the template of ``tokenizer``, the policy's, makes of it, and where
    that has none, what people read. A comparison of a chat that the template does not take prefers nobody."""
    prompt, messages = one.prompt, one.metadata.get("messages")
    prefers = one.verdict in ("first", "second")
    if messages and tokenizer.chat_template:
        where = f"Comparison {one.id} of the preference store"
        try:
            _, prompt = encode_prompt(messages, tokenizer, where, one.metadata)
        except ValueError as error:
            warnings.warn(f"{error} It is left out.", stacklevel=2)
            prefers = False
    chosen, rejected = one.answers if one.verdict == "first" else one.answers[::-1]
    return {
        "id": one.id,
        "step": one.step,
        "prompt": prompt,
        "chosen": chosen if prefers else None,
        "rejected": rejected if prefers else None,
        "margin": float(one.metadata.get("margin") or 0.0),
        "verdict": one.verdict,
        "annotator": one.annotator,
        "simulated": one.simulated,
    }
