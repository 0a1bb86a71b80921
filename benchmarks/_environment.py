"""What the numbers of a benchmark depend on, and where they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lesa.ops import backend, native
from lesa.util.files import write_atomically
from lesa.util.machine import processor
from lesa.util.strict_json import to_json
from lesa.util.versions import versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMI = (  # of nvidia-smi --query-gpu
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "power.draw", "temperature.gpu", "pstate", "utilization.gpu",
)  # fmt: skip


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Date, commit, device, versions and load; of a GPU also clocks and the power limit.

    LESA_COMMIT names the commit where the tree was copied without its history, or with another.
    """
    device = torch.device(device)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(sys.argv),
        "device": gpu(device) if device.type == "cuda" else {"name": processor()},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.isa(),
        "load": os.getloadavg(),
        "backend": backend.active(device),
        "versions": versions() | {"cuda": torch.version.cuda},
    }


def command(arguments: list[str]) -> list[str]:
    """Script and options; not where results go, which is a matter of the machine."""
    script, *rest = arguments
    for option in {"--out", "--report"}.intersection(rest):
        at = rest.index(option)
        del rest[at : at + 2]
    return [Path(script).name, *rest]


def commit() -> str:
    """LESA_COMMIT, else the commit's short hash, with a + where files that git knows differ."""
    if given := os.environ.get("LESA_COMMIT"):
        return given
    found = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return found + "+" * bool(changed) if found else "unknown"


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, size and state of a CUDA device."""
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "nvidia_smi": _smi(facts),
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON; a benchmark that is stopped leaves its last whole state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(content))


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _smi(facts: Any) -> dict[str, str]:
    """The driver's answers; empty where nvidia-smi gives none."""
    query = ("nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader")
    found = (_output(*query, "-i", f"GPU-{facts.uuid}") or _output(*query)).split(", ")
    return dict(zip(SMI, found, strict=True)) if len(found) == len(SMI) else {}


def _output(*command: str) -> str:
    """Standard output of a command, empty where it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
