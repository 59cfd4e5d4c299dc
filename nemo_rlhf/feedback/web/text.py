"""What a model wrote, as HTML that cannot do anything: escaped, cut to a readable length, with nothing invisible in it.

Text of a model is hostile: it may hold markup, a hundred thousand characters, or characters that turn the reading
direction round, so that people see something other than what they judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache

from markupsafe import Markup, escape

HEAD_CHARACTERS = 4000  # that are seen without asking for more
HEAD_LINES = 60
_TAIL = 400  # characters that are not worth hiding
MAX_WORDS = 3000  # in both texts together; comparing more takes too long
_MAX_MATCHES = 50_000  # pairs of equal words, one of each text: few in any prose, and what comparing takes its time for

# What shows nothing, or changes how others are shown: controls other than tab and newline, halves of surrogate pairs,
# Unicode's Default_Ignorable_Code_Point, other format characters, fillers and blanks.
_NOTHING = (
    "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U00016fe4\U000e0000-\U000e0fff\ud800-\udfff"
)
# Joiners are left where a script or emoji may need them: not behind ASCII or another joiner, where they hide data. So
# is what asks for the plain or the coloured form of a sign, behind a sign.
_SIGNS = "#*0-9\xa9\xae\u203c-\u205f\u2070-\u27ff\u2801-\u303d\u3297\u3299\U0001f000-\U0001faff"
_INVISIBLE = re.compile(f"([{_NOTHING}]|(?<=[\x00-\x7f\u200c\u200d])[\u200c\u200d]|(?<=[^{_SIGNS}])[\ufe0e\ufe0f])\\1*")
# Marks that stand on the character before them, of which a stack has no end and no place to break a line.
_MARKS = "".join(chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) in ("Mn", "Me"))
_STACK = re.compile(f"[{_MARKS}]{{8}}")
# space, one ideograph or kana, a word, one other sign
_WORD = re.compile(r"\s+|[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")

Span = tuple[int, int]


@dataclass(frozen=True)
class Shown:
    """A text as the page shows it: ``rest`` only when asked for, ``num_hidden`` characters of it."""

    head: Markup
    rest: Markup
    num_hidden: int


def shown(text: str, changed: Sequence[Span] = ()) -> Shown:
    """``text`` as HTML; the spans ``changed`` (ascending, apart) are marked."""
    cut = _cut(text)
    return Shown(_html(text, 0, cut, changed), _html(text, cut, len(text), changed), len(text) - cut)


def one_line_ends(text: str) -> str:
    """``text`` with the line ends that a browser would make of it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@lru_cache(maxsize=128)  # a page is looked at again and again
def differences(left: str, right: str) -> tuple[list[Span], list[Span]] | None:
    """Spans of words that only one of the two texts has; None where they are too long to compare."""
    words = [[match for match in _WORD.finditer(text) if not match[0].isspace()] for text in (left, right)]
    counts = [Counter(word[0] for word in found) for found in words]
    if sum(map(len, words)) > MAX_WORDS or sum(n * counts[1][word] for word, n in counts[0].items()) > _MAX_MATCHES:
        return None
    matcher = SequenceMatcher(None, [word[0] for word in words[0]], [word[0] for word in words[1]])
    spans: tuple[list[Span], list[Span]] = ([], [])
    for kind, *ends in matcher.get_opcodes():
        if kind != "equal":
            for side, (begin, end) in enumerate((ends[:2], ends[2:])):
                if begin < end:
                    spans[side].append((words[side][begin].start(), words[side][end - 1].end()))
    return spans


def _cut(text: str) -> int:
    """Where the part ends that is seen at once: at a space, if there is one nearby."""
    cut, at = min(len(text), HEAD_CHARACTERS), -1
    for _ in range(HEAD_LINES):
        at = text.find("\n", at + 1, cut)
        if at < 0:
            break
    else:
        cut = at + 1
    if len(text) - cut <= _TAIL and text.count("\n", cut) <= HEAD_LINES // 4:
        return len(text)
    nearby = [text.rfind(space, cut - _TAIL, cut) for space in (" ", "\n")]
    return max(nearby) + 1 if max(nearby) >= 0 else cut


def _html(text: str, begin: int, end: int, changed: Sequence[Span]) -> Markup:
    parts: list[Markup] = []
    for start, stop, is_changed in _stretches(begin, end, changed):
        inner = _visible(text[start:stop])
        parts.append(Markup("<mark>{}</mark>").format(inner) if is_changed else inner)
    return Markup("").join(parts)


def _stretches(begin: int, end: int, changed: Sequence[Span]) -> Iterator[tuple[int, int, bool]]:
    at = begin
    for start, stop in changed:
        start, stop = max(start, begin), min(stop, end)
        if start < stop:
            yield at, start, False
            yield start, stop, True
            at = stop
    yield at, end, False


def _visible(text: str) -> Markup:
    """``text`` escaped, with a name in place of each run of one invisible character, and places to break a line in
    stacks of marks."""
    return Markup(_STACK.sub(r"\g<0><wbr>", _INVISIBLE.sub(_name, str(escape(text)))))


def _name(run: re.Match[str]) -> str:
    times = f" ×{len(run[0])}" if len(run[0]) > 1 else ""
    return f"<i>U+{ord(run[1]):04X}{times}</i>"
