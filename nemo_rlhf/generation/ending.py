"""When a continuation ends, and how it reads.

A stop string may span several tokens, and a byte-level token may hold part of a character, so stop strings are looked
for in decoded text. Decoding everything after every token would cost more than small models' forward passes: only
tokens that can end a stop string make their tail be decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_rlhf.generation.sampling import SamplingParams
from nemo_rlhf.types import FinishReason

_PARTIAL = "\ufffd"  # what an incomplete character decodes to
_SLACK = 4  # tokens: decoders treat the first one specially (leading space, half a character)


class Ending:
    """The end of continuations under one set of sampling parameters.

    ``tokenizer``: transformers', or anything with its ``decode``, ``eos_token_id`` and ``all_special_ids``.
    """

    def __init__(self, tokenizer: Any, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._stop = sampling.stop
        self._max_new_tokens = sampling.max_new_tokens
        self._eos = None if sampling.ignore_eos else tokenizer.eos_token_id
        self._special = frozenset(tokenizer.all_special_ids)
        self._can_end_stop: dict[int, bool] = {}
        # every token that leaves a trace in the text adds at least one byte to it
        self._tail = max((len(text.encode()) for text in self._stop), default=0) + _SLACK

    def reason(self, response: Sequence[int]) -> FinishReason | None:
        """Why the response is complete with its last token, or None: it goes on."""
        token = response[-1]
        if token == self._eos:
            return "eos"
        if self._stop and self._completes_stop(response):
            return "stop"
        return "length" if len(response) >= self._max_new_tokens else None

    def text(self, response: Sequence[int], reason: FinishReason) -> str:
        """The response without special tokens, cut before the stop string that ended it."""
        text = self._decode(response)
        return text[: self._first_stop(text)] if reason == "stop" else text

    def _completes_stop(self, response: Sequence[int]) -> bool:
        token = response[-1]
        possible = self._can_end_stop.get(token)
        if possible is None:
            possible = self._can_end_stop[token] = self._contains_an_end(token)
        if not possible:
            return False
        tail: list[int] = []
        for token in reversed(response):
            if token not in self._special:
                tail.append(token)
                if len(tail) == self._tail:
                    break
        # the whole text decides: the tail alone may begin in the middle of a character
        return self._first_stop(self._decode(tail[::-1])) is not None and (
            self._first_stop(self._decode(response)) is not None
        )

    def _contains_an_end(self, token: int) -> bool:
        text = self._decode([token])
        # a decoder may drop a space that begins the text, so a space cannot be ruled out
        return _PARTIAL in text or any(stop[-1] in text or stop[-1] == " " for stop in self._stop)

    def _first_stop(self, text: str) -> int | None:
        found = [place for place in map(text.find, self._stop) if place >= 0]
        return min(found, default=None)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
