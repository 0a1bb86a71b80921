"""Triton kernels of lesa: what runs on a skipped step, at the speed of memory.

    from lesa_kernels.mix import mix            # likewise spline_mix and mix_modulate
    from lesa_kernels.experimental.gram import gram    # what no pipeline runs: fp8, gradients, gram

All launchers take what varies from step to step as device tensors, so that a CUDA graph can replay
them, and write into `out`. Only their modules import Triton, which has no wheel for macOS and
Windows; this one imports it never.

This package lies under `kernels/`, which must stay without an `__init__.py`: as a regular package
that folder would shadow Hugging Face's `kernels`, which diffusers imports by name.
"""

from __future__ import annotations

from importlib import util
from importlib.metadata import PackageNotFoundError, version

__all__ = ["triton_version"]


def triton_version() -> str | None:
    """The installed Triton's version, or None where there is none; Triton is not imported."""
    if util.find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"
