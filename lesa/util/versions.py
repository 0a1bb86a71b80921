"""What is installed here: the facts of a bug report."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from lesa._version import __version__

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "triton",
    "nvtx",
    "flash-attn",
    "torchmetrics",
)


def versions() -> dict[str, str]:
    """lesa, Python and the installed ones of `PACKAGES`, by name."""
    found = {"lesa": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
