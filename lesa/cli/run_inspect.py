"""`lesa inspect`: a forecaster, its tables and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lesa.cli.output import say
from lesa.core.schedule import Schedule
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.worth import Worth, speedup

SHADES = " ░▒▓█"
_TITLE = "PSNR against the plain run, dB, and predicted speed-up of the denoising"


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
                "worth": None if entry.worth is None else entry.worth.to_dict(),
                "guard": entry.guard and entry.guard.described(entry.schedule),
                "speedup": _speedup(entry),
                "made_from": _made_from(_table(forecaster, entry, forecaster.branches[0])),
                "tables": {
                    name: table.coefficients.tolist() for name, table in _tables(forecaster, entry)
                },
            }
            for entry in forecaster.calibrations
        ],
    }


def print_forecaster(forecaster: Any, console: Console) -> None:
    """Provenance, then per calibrated list its full steps and each table as a strip per column."""
    say(console, f"{forecaster.name}  tap {forecaster.tap}")
    for field, value in forecaster.metadata.items():
        say(console, f"  {field}: {_in_words(value)}")
    if forecaster.calibrations:
        console.print(worth_table(forecaster.calibrations))
    for entry in forecaster.calibrations:
        schedule = entry.schedule
        say(console, f"\n{len(schedule.full_steps)} of {schedule.steps} steps in full")
        say(console, f"  {'full':>8} {_full(schedule)}")
        if entry.guard is not None:
            guard = entry.guard
            told = f"where the change at step {guard.step} is above {guard.limit:.3g}"
            say(console, f"  {guard.kind:>8} {_full(guard.schedule)}  {told}")
        first = _table(forecaster, entry, forecaster.branches[0])
        say(console, f"  {'from':>8} {_sources(first)}")
        for whose, table in _tables(forecaster, entry):
            for name, column in zip(_columns(table), table.coefficients.T, strict=True):
                say(console, f"  {name:>8} {_strip(column)}  {whose}")
    say(console, "\n  darker: a larger coefficient; its sign and value: --picture or --json")


def worth_table(calibrations: Sequence[Calibration]) -> Table:
    """What each list is worth, for a terminal of 80 columns; a dash for what was not measured.

    LPIPS has its column where any list has a value, "own" stands for the prompts of the fit.
    """
    worths = [entry.worth for entry in calibrations]
    far = any(worth is not None and worth.lpips_mean is not None for worth in worths)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=_TITLE, caption=_caption(worths))
    table.add_column("full", no_wrap=True)
    table.add_column("at steps", overflow="fold")
    for column in ("faster", "mean", "p10", "min", *["LPIPS", "max"] * far, "pictures"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry, worth in zip(calibrations, worths, strict=True):
        schedule = entry.schedule
        cells = ["-"] * (6 if far else 4)
        if worth is not None:
            cells = [f"{value:.1f}" for value in (worth.mean, worth.p10, worth.minimum)]
            cells += [_three(value) for value in (worth.lpips_mean, worth.lpips_max)] * far
            cells.append(f"{worth.pictures}" + ("" if worth.validated else " own"))
        table.add_row(
            f"{len(schedule.full_steps)} of {schedule.steps}",
            " ".join(map(str, schedule.full_steps)),
            f"{_speedup(entry):.2f}x",
            *cells,
        )
    return table


def _caption(worths: Sequence[Worth | None]) -> str | None:
    """What the table cannot say for itself."""
    measured = [worth for worth in worths if worth is not None]
    told = []
    if not measured:
        told.append("not measured: train anew to have it")
    if any(not worth.validated for worth in measured):
        told.append("own: prompts of the fit, so that others may come out worse")
    if any(worth is None or worth.share is None for worth in worths):
        told.append("faster: where a skipped step takes no time")
    return "; ".join(told) or None


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _speedup(entry: Calibration) -> float:
    """Predicted, of the denoising, in the mean where a guard spends full steps."""
    share = None if entry.worth is None else entry.worth.share
    return speedup(entry.mean_full_steps, entry.schedule.steps, share)


def _in_words(value: Any) -> str:
    """A value of the metadata without the brackets of Python."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_in_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_in_words, value))
    return str(value)


def draw_tables(forecaster: Any, folder: Path | None) -> dict[Path, bytes]:
    """A heat map for every calibrated list and branch, and what the lists are worth where that was
    measured; nothing without a folder."""
    from lesa.evaluation.plots import table_png

    if folder is None:
        return {}
    drawn = {}
    for entry in forecaster.calibrations:
        count, steps = len(entry.schedule.full_steps), entry.schedule.steps
        for name, table in _tables(forecaster, entry):
            png = table_png(table, f"{count} of {steps} steps in full, {name}")
            drawn[folder / f"table-{count}-of-{steps}-{name.replace(' ', '-')}.png"] = png
    if (plot := worth_picture(forecaster)) is not None:
        drawn[folder / "worth.png"] = plot
    return drawn


def worth_picture(forecaster: Any) -> bytes | None:
    """A plot of what the lists are worth as PNG; None where training did not measure that."""
    from lesa.evaluation.plots import worth_png

    lines = _worth_lines(forecaster.calibrations)
    return worth_png(lines) if lines else None


def _worth_lines(calibrations: Sequence[Calibration]) -> dict[str, list[dict[str, Any]]]:
    """The points of the plot, by number of steps."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for entry in calibrations:
        if entry.worth is not None:
            point = {"full_steps": len(entry.schedule.full_steps), "speedup": _speedup(entry)}
            line = lines.setdefault(f"of {entry.schedule.steps} steps", [])
            line.append(point | entry.worth.to_dict())
    return lines


def _full(schedule: Schedule) -> str:
    """One character per step, dark for a full one."""
    return "".join("█" if schedule.is_full(s) else "·" for s in range(schedule.steps))


def _made_from(table: Any) -> list[str]:
    return [table.used(step) for step in range(table.schedule.steps)]


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
