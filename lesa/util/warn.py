"""Warnings that point at the user's own line."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

# A call of the user's passes through these on its way to lesa.
_BETWEEN = {"accelerate", "contextlib", "diffusers", "lesa", "peft", "torch"}


def warn(text: str) -> None:
    """A UserWarning at the nearest caller outside of lesa and of the libraries that call it."""
    level, frame = 1, sys._getframe(1)
    while str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        if frame.f_back is None:
            break
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level + 1)
