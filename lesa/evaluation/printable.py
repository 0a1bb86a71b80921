"""Text that users typed, made fit for figures and pages."""

from __future__ import annotations

from unicodedata import category

REPLACEMENT = "\ufffd"  # what Unicode puts in the place of a character that cannot be shown


def printable(text: str, limit: int | None = None) -> str:
    """One line of text without control characters and lone surrogates, cut after `limit`
    characters."""
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    shown = (REPLACEMENT if category(char) in ("Cc", "Cs") else char for char in text)
    return "".join(" " if char.isspace() else new for char, new in zip(text, shown, strict=True))
