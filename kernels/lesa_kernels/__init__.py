"""Triton kernels of lesa.

This package lies under `kernels/`, which must stay without an `__init__.py`: as a regular package
that folder would shadow Hugging Face's `kernels`, which diffusers imports by name.
"""

from __future__ import annotations

from importlib import util
from importlib.metadata import PackageNotFoundError, version

__all__ = ["triton_version"]


def triton_version() -> str | None:
    """The installed Triton's version, or None where there is none (macOS, Windows, plain install).

    Triton itself is not imported: the extra `kernels` brings it, and nothing here needs it yet.
    """
    if util.find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"
