"""The parts of commands that are more than one call."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lesa.util.versions import versions

SHADES = " ░▒▓█"
_TUNE = "python -m lesa_kernels.tune times them once"
CONFIGURATIONS = {  # of Triton's kernels, by `lesa_kernels.config.source`
    "tuned": "tuned: timed on this device",
    "untimed": f"untimed: chosen from compiled code; {_TUNE}",
    "default": f"default: safe on any device; {_TUNE}",
}


def describe(forecaster: Any) -> dict[str, Any]:
    """A forecaster as plain values: settings, provenance, calibrated lists with their tables."""
    return {
        "name": forecaster.name,
        "settings": forecaster.settings.to_dict(),
        "metadata": forecaster.metadata,
        "calibrated": [
            {
                "num_steps": entry.schedule.steps,
                "full_steps": list(entry.schedule.full_steps),
                "sigmas": list(entry.sigmas),
                "made_from": [
                    _table(forecaster, entry, forecaster.branches[0]).used(step)
                    for step in range(entry.schedule.steps)
                ],
                "tables": {
                    name: table.coefficients.tolist() for name, table in _tables(forecaster, entry)
                },
            }
            for entry in forecaster.calibrations
        ],
    }


def print_forecaster(forecaster: Any, console: Console) -> None:
    """Provenance, then per calibrated list its full steps and each table as a strip per column."""
    console.print(f"[bold]{forecaster.name}[/]  tap {forecaster.tap}")
    for field, value in forecaster.metadata.items():
        console.print(f"  {field}: {value}", markup=False, soft_wrap=True)
    for entry in forecaster.calibrations:
        schedule = entry.schedule
        steps = "".join("█" if schedule.is_full(s) else "·" for s in range(schedule.steps))
        console.print(f"\n{len(schedule.full_steps)} of {schedule.steps} steps in full")
        console.print(f"  {'full':>8} {steps}", soft_wrap=True)
        first = _table(forecaster, entry, forecaster.branches[0])
        console.print(f"  {'from':>8} {_sources(first)}", soft_wrap=True)
        for whose, table in _tables(forecaster, entry):
            for name, column in zip(_columns(table), table.coefficients.T, strict=True):
                console.print(f"  {name:>8} {_strip(column)}  {whose}", soft_wrap=True)
    console.print("\n  darker: a larger coefficient; its sign and value: --picture or --json")


def draw_tables(forecaster: Any, folder: Path | None) -> dict[Path, bytes]:
    """A heat map for every calibrated list and branch; nothing without a folder."""
    from lesa.evaluation.plots import table_png

    if folder is None:
        return {}
    drawn = {}
    for entry in forecaster.calibrations:
        count, steps = len(entry.schedule.full_steps), entry.schedule.steps
        for name, table in _tables(forecaster, entry):
            png = table_png(table, f"{count} of {steps} steps in full, {name}")
            drawn[folder / f"table-{count}-of-{steps}-{name.replace(' ', '-')}.png"] = png
    return drawn


def environment() -> dict[str, Any]:
    """Versions, devices, backends of the kernels and of diffusers' attention, by name."""
    import torch
    from lesa_kernels.config import source

    from lesa.cli.full_step import attention_backends
    from lesa.cli.inputs import quieten
    from lesa.ops import backend

    found: dict[str, Any] = {**versions(), "platform": platform.platform()}
    found["cpu threads"] = torch.get_num_threads()
    found["cuda"] = torch.version.cuda or "none in this torch"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["devices"] = gpus or ["cpu"]
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


def environment_lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """`environment` for people: names and texts; what has the same reason shares a line."""
    for name, value in facts.items():
        if isinstance(value, dict):
            for at, reason in enumerate(dict.fromkeys(value.values())):
                listed = ", ".join(key for key, why in value.items() if why == reason)
                yield name * (at == 0), f"{listed}: {reason}"
        else:
            yield name, ", ".join(value) if isinstance(value, list) else str(value)


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


def _table(forecaster: Any, entry: Any, branch: str) -> Any:
    return forecaster.table(entry.schedule, entry.sigmas, branch)


def _tables(forecaster: Any, entry: Any) -> Iterator[tuple[str, Any]]:
    """Every table of a calibrated list: of each branch, and of its batched guidance parts."""
    for branch in forecaster.branches:
        table = _table(forecaster, entry, branch)
        yield branch, table
        if table.parts > 1:
            yield from ((f"{branch} part {p + 1}", table.part(p)) for p in range(table.parts))


def _sources(table: Any) -> str:
    """What the skipped steps are forecast from: "1 of 3 features + latent at steps 1-3; ..."."""
    found: dict[str, list[int]] = {}
    for step in table.schedule.skipped_steps:
        found.setdefault(table.used(step), []).append(step)
    return "; ".join(f"{what} at {_ranges(steps)}" for what, steps in found.items()) or "-"


def _ranges(steps: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def _columns(table: Any) -> list[str]:
    names = [f"{k} back" for k in range(1, table.history + 1)]
    return [*names, "latent"] if table.uses_latent else names


def _strip(column: Tensor) -> str:
    """One character per step, darker for a larger absolute value."""
    size = column.abs() / max(float(column.abs().max()), 1e-9)
    return "".join(SHADES[round(value * (len(SHADES) - 1))] for value in size.tolist())
