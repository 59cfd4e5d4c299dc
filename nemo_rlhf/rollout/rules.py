"""Reward functions that ship: rules on texts, and penalties for responses that are too long or do not end.

Each is named in the configuration, ``function: nemo_rlhf.rollout.rules:exact_answer``, and gets its keywords from
``arguments``. Their weights in ``reward.sources`` say how much they count.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

_BEFORE = string.punctuation.translate(str.maketrans("", "", "+-.")) + " $€£"  # what stands before a number stays
_DIGITS = 28  # which Decimal keeps exactly


def regex_match(outputs: Sequence[str], *, pattern: str, whole: bool = False, **rest: Any) -> list[float]:
    """1 where ``pattern`` is found in the response (``whole``: matches all of it, but for space around it), else 0.
    A dot matches line breaks too."""
    compiled = re.compile(pattern, re.DOTALL)
    found = (compiled.fullmatch(output.strip()) if whole else compiled.search(output) for output in outputs)
    return [float(match is not None) for match in found]


def exact_answer(
    outputs: Sequence[str], *, field: str = "answer", pattern: str | None = None, **metadata: Any
) -> list[float]:
    """1 where the response is the prompt's ``field`` after ``normalise``, else 0. The field may be a list of answers.

    ``pattern``: the answer is what its first group (or all of it) matches last in the response; 0 where it matches
    nothing.
    Raises ValueError where a prompt has no such field.
    """
    compiled = None if pattern is None else re.compile(pattern, re.DOTALL)
    expected = metadata.get(field, [None] * len(outputs))
    rewards = []
    for output, answer in zip(outputs, expected, strict=True):
        if answer is None:
            raise ValueError(f'a prompt has no field "{field}" to compare the response with')
        answers = answer if isinstance(answer, (list, tuple)) else [answer]
        given = output if compiled is None else _last(compiled, output)
        rewards.append(float(given is not None and normalise(given) in {normalise(str(one)) for one in answers}))
    return rewards


def length_penalty(
    output_ids: Sequence[Sequence[int]], *, free_tokens: int, per_token: float = 1.0, **rest: Any
) -> list[float]:
    """Minus ``per_token`` for every token of the response (EOS included) beyond the first ``free_tokens``."""
    return [-per_token * max(0, len(ids) - free_tokens) for ids in output_ids]


def missing_eos_penalty(finish_reasons: Sequence[str], *, penalty: float = 1.0, **rest: Any) -> list[float]:
    """Minus ``penalty`` where the response was cut at ``generation.max_new_tokens``: it met neither EOS nor a stop
    string."""
    return [-penalty if reason == "length" else 0.0 for reason in finish_reasons]


def normalise(text: str) -> str:
    """Case, space, and punctuation around the whole do not matter, and neither does how a number is written: "$1,200.0"
    is "1200"."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    bare = " ".join(words).lstrip(_BEFORE).rstrip(string.punctuation + " ")
    try:
        number = Decimal(re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", bare))
    except InvalidOperation:
        return bare
    if not number.is_finite() or max(len(number.as_tuple().digits), abs(number.adjusted())) > _DIGITS:
        return bare  # written out it might fill the memory
    return format(number.normalize(), "f") if number else "0"


def _last(pattern: re.Pattern[str], text: str) -> str | None:
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    found: str | None = matches[-1].group(1 if pattern.groups else 0)
    return found
