"""Lines for a terminal: names of classes and files are data, and nothing in them may steer it or begin a line."""

from __future__ import annotations

import unicodedata

__all__ = ["say", "visible"]

# Marks that turn the direction of the text after them.
TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: object) -> str:
    """`text` on one line, with what is no character to be seen (escapes, newlines, bytes of no text) spelled out."""
    return "".join(_spelled(c) if c in TURNING or unicodedata.category(c) in _UNSEEN else c for c in str(text))


_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # controls, halves of characters, separators of lines and paragraphs


def _spelled(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def say(*lines: object) -> None:
    """Print each of `lines` on a line of its own."""
    print(*map(visible, lines), sep="\n", flush=True)
