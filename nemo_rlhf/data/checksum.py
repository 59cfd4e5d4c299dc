"""A checksum of tokenised data: what is learned from, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any


def checksum(records: Iterable[Any]) -> str:
    """Hex SHA-256 of prompts, texts, pairs, dialogues or scored texts (``types``): their token ids, masks, rewards and
    fields, in their order."""
    digest = hashlib.sha256()
    for record in records:
        for name, value in vars(record).items():
            digest.update(f"\0{name}\0".encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, tuple):
        for kind in ("q", "d"):  # whole numbers, any numbers
            with suppress(TypeError, OverflowError):
                return array(kind, value).tobytes()
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    # of objects that are no JSON, which Python programs may put into fields, the kind counts: they have no bytes
    return json.dumps(_plain(value), default=lambda thing: type(thing).__name__).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted(([str(key), _plain(inner)] for key, inner in value.items()), key=lambda pair: pair[0])
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
