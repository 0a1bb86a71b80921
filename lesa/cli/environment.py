"""`lesa env`: what a bug report needs, on one screen; the denoiser classes that lesa knows."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lesa.util.versions import versions

__all__ = ["environment", "environment_lines", "environment_table", "model_rows", "models_table"]

_TUNE = "python -m lesa_kernels.tune times them once"
CONFIGURATIONS = {  # of Triton's kernels, by `lesa_kernels.config.source`
    "tuned": "tuned: timed on this device",
    "untimed": f"untimed: chosen from compiled code; {_TUNE}",
    "default": f"default: safe on any device; {_TUNE}",
}
_FIRST = ("lesa", "python")
_LINKS = re.compile(r"^.*?Please (build|install)(?: it with pip install)? ")


def environment() -> dict[str, Any]:
    """Versions, devices, backends of the kernels and of diffusers' attention, by name."""
    import torch
    from lesa_kernels.config import source

    from lesa.cli.full_step import attention_backends
    from lesa.cli.inputs import quieten
    from lesa.ops import backend

    found: dict[str, Any] = {**versions(), "platform": platform.platform()}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["devices"] = gpus or ["cpu"]
    found["cpu threads"] = torch.get_num_threads()
    found["cuda"] = cuda_in_words(torch)
    if gpus:
        found["kernel configs"] = {name: CONFIGURATIONS[source(name)] for name in gpus}
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    found["backend"] = backend.active(kind)
    for name in backend.BACKENDS:
        if reason := backend.why_not(name, kind):
            found[f"not {name}"] = reason
    quieten()
    attention = attention_backends(kind, torch.bfloat16 if kind == "cuda" else torch.float32)
    found["attention"] = [name for name, reason in attention.items() if not reason]
    found["no attention"] = {name: reason for name, reason in attention.items() if reason}
    return found


def cuda_in_words(torch: Any) -> str:
    """The CUDA of this torch; where the build and the machine do not fit each other, why and what
    helps."""
    driver = shutil.which("nvidia-smi") is not None
    if torch.version.hip is not None:
        return f"none; a build for ROCm {torch.version.hip}"
    if torch.version.cuda is None:
        if driver:
            return (
                f"none: torch {torch.__version__} is a CPU build, but nvidia-smi is here;"
                " install a CUDA build of torch (see pytorch.org) to use the GPU"
            )
        return f"none: torch {torch.__version__} is a CPU build"
    if torch.cuda.is_available():
        return str(torch.version.cuda)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        reason = f"CUDA_VISIBLE_DEVICES={hidden!r} hides them; unset it"
    elif driver:
        reason = f"see with nvidia-smi whether the driver serves CUDA {torch.version.cuda}"
    else:
        reason = "no NVIDIA driver is here (no nvidia-smi); everything runs on the CPU"
    return f"torch {torch.__version__}, but no CUDA device is visible: {reason}"


def environment_lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`environment` for people: names and texts; what has the same reason shares a line."""
    packages = {name: facts[name] for name in versions() if name not in _FIRST}
    yield "lesa", f"{facts['lesa']} on Python {facts['python']}, {facts['platform']}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in packages.items())
    yield "devices", f"{', '.join(facts['devices'])}; {facts['cpu threads']} CPU threads"
    told = {*_FIRST, *packages, "platform", "devices", "cpu threads"}
    for name, value in facts.items():
        if isinstance(value, dict):
            short = {key: _short(why) for key, why in value.items()}
            for at, reason in enumerate(dict.fromkeys(short.values())):
                listed = ", ".join(key for key, why in short.items() if why == reason)
                yield name * (at == 0), f"{listed}: {reason}"
        elif name not in told:
            yield name, ", ".join(value) if isinstance(value, list) else str(value)


def environment_table(facts: Mapping[str, Any]) -> Table:
    """`environment_lines` in two columns, which are as wide as the terminal is."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in environment_lines(facts):
        table.add_row(Text(name), Text(text))
    return table


def _short(reason: str) -> str:
    """What is to be installed, of diffusers' sentence that a package is missing."""
    short = _LINKS.sub(lambda found: f"{found[1]} ", reason)
    return short.split(". This is likely")[0]


def model_rows() -> list[dict[str, Any]]:
    """The denoiser classes that have a row, and what this diffusers makes of them."""
    import diffusers

    from lesa.hooks.model_specs import known_models

    rows = []
    for name, spec in known_models().items():
        cls = getattr(diffusers, name, None)
        rows.append(
            {
                "class": name,
                "blocks": spec.blocks,
                "tail": spec.tail,
                "taps": spec.taps,
                "cache_mixin": hasattr(cls, "enable_cache") if cls else None,
                "notes": spec.notes if cls else "not in this diffusers",
            }
        )
    return rows


def models_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """`model_rows` for people, whole names in 80 columns."""
    table = Table("class", "blocks, then the tail", "taps")
    for row in rows:
        name = Text.assemble(row["class"], (f"\n{row['notes']}" if row["notes"] else "", "dim"))
        modules = [*row["blocks"], f"> {row['tail']}"]
        table.add_row(name, Text("\n".join(modules)), Text("\n".join(row["taps"])))
    return table
