"""What people's code gives, in words and numbers: its errors, its values."""

from __future__ import annotations

from typing import Any


def one_line(error: BaseException) -> str:
    """The kind of the error and what it says."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # its own __str__ is wrong, too
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def plain(value: Any) -> Any:
    """Tensors, arrays and their scalars as numbers and lists; anything else as it is."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return value.tolist() if hasattr(value, "tolist") else value


def brief(value: Any) -> str:
    """The value as a short piece of a sentence."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its own __repr__ is wrong
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
