"""Text that others wrote, for a line on a terminal or in a log."""

from __future__ import annotations


def printable(text: str, length: int = 1000) -> str:
    """The text in one line of at most ``length`` characters, with escapes for what a terminal would take for orders."""
    words = " ".join(text[: 20 * length].split())
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in words[:length])
    return shown if len(words) <= length and len(shown) <= length else f"{shown[: length - 3]}..."
