"""What machine this is: what seconds and bytes depend on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

__all__ = ["load", "peak_bytes", "processor"]


def processor() -> str:
    """Name of the CPU."""
    known = Path("/proc/cpuinfo")  # of Linux
    lines = known.read_text().splitlines() if known.is_file() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def load() -> float | None:
    """Processes that waited for a core in the last minute, on average; None on Windows."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def peak_bytes() -> int | None:
    """The most memory on the host that this process has held; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB but for macOS
    return held * (1 if sys.platform == "darwin" else 1024)
