"""When a continuation ends, and how it reads.

A stop string may span several tokens, and a byte-level token may hold part of a character, so stop strings are looked
for in decoded text. Decoding everything after every token would cost more than small models' forward passes: only
tokens that can end a stop string make their tail be decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_rlhf.data.chat_format import response_ends
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
        self._ends = frozenset() if sampling.ignore_eos else response_ends(tokenizer)
        self._stop_ids = frozenset(sampling.stop_token_ids)
        if hasattr(tokenizer, "__len__") and (beyond := [one for one in self._stop_ids if one >= len(tokenizer)]):
            raise ValueError(
                f"generation.stop_token_ids has {beyond[0]}, and the tokenizer has {len(tokenizer)} tokens."
            )
        special = frozenset(tokenizer.all_special_ids)
        names = [self._tokenizer.decode([token]) for token in special] if self._stop else []
        # Special tokens are a part of the text in which stop strings are looked for where one of those names one.
        self._shows_special = any(name and name in stop for name in names for stop in self._stop)
        self._hidden = frozenset() if self._shows_special else special
        self._can_end_stop: dict[int, bool] = {}
        # every token that leaves a trace in the text adds at least one byte to it
        self._tail = max((len(text.encode()) for text in self._stop), default=0) + _SLACK

    def reason(self, response: Sequence[int]) -> FinishReason | None:
        """Why the response is complete with its last token, as in ``FinishReason``; None: it goes on."""
        token = response[-1]
        if token in self._ends or token in self._stop_ids:
            if token == self._tokenizer.eos_token_id:
                return "eos"
            return f"{'eos' if token in self._ends else 'stop'}:{self._tokenizer.decode([token])}"
        if self._stop and (stop := self._completed_stop(response)) is not None:
            return f"stop:{stop}"
        return "length" if len(response) >= self._max_new_tokens else None

    def text(self, response: Sequence[int], reason: FinishReason) -> str:
        """The response without special tokens, cut before the token or the stop string that ended it."""
        tokens = list(response)
        if reason == "length":
            return self._decode(tokens, hide=True)
        if tokens[-1] in self._ends or tokens[-1] in self._stop_ids:
            return self._decode(tokens[:-1], hide=True)
        text = self._decode(tokens)
        place = text.find(reason.removeprefix("stop:"))
        if not self._shows_special:
            return text[:place]
        # Special tokens before the stop string go, too: whole tokens first, then what it has of the one it begins in.
        whole = next(n for n in range(len(tokens), -1, -1) if len(self._decode(tokens[:n])) <= place)
        return self._decode(tokens[:whole], hide=True) + text[len(self._decode(tokens[:whole])) : place]

    def _completed_stop(self, response: Sequence[int]) -> str | None:
        token = response[-1]
        possible = self._can_end_stop.get(token)
        if possible is None:
            possible = self._can_end_stop[token] = self._contains_an_end(token)
        if not possible:
            return None
        tail: list[int] = []
        for token in reversed(response):
            if token not in self._hidden:
                tail.append(token)
                if len(tail) == self._tail:
                    break
        # the whole text decides: the tail alone may begin in the middle of a character
        if self._first_stop(self._decode(tail[::-1])) is None:
            return None
        return self._first_stop(self._decode(response))

    def _contains_an_end(self, token: int) -> bool:
        text = self._decode([token])
        # a decoder may drop a space that begins the text, so a space cannot be ruled out
        return _PARTIAL in text or any(stop[-1] in text or stop[-1] == " " for stop in self._stop)

    def _first_stop(self, text: str) -> str | None:
        """The stop string that begins first in ``text``."""
        return min((stop for stop in self._stop if stop in text), key=text.find, default=None)

    def _decode(self, tokens: Sequence[int], *, hide: bool = False) -> str:
        skip = hide or not self._shows_special
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
