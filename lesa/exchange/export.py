"""Step lists as files of other programs: made completely before any is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.core.checks import shown
from lesa.errors import LesaError
from lesa.exchange import cache_dit, lesa_json, sglang
from lesa.exchange.step_lists import StepList, step_lists
from lesa.forecasters.lesa import LesaForecaster
from lesa.util.files import as_path, require_writable, write_atomically
from lesa.util.warn import warn

__all__ = ["TARGETS", "export"]


@dataclass(frozen=True)
class Target:
    """A program: what checks its version (the given one, else that installed here) and tells the
    one that is written for, and what makes its files, by name."""

    version: Callable[[str | None], str]
    files: Callable[[Sequence[StepList], Mapping[str, Any]], dict[str, str]]
    alone: bool = False  # it reads every .json of the folder
    guards: bool = False  # its files hold guards too


TARGETS = {
    "cache-dit": Target(cache_dit.version, cache_dit.files),
    "sglang": Target(sglang.version, sglang.files, alone=True),
    "json": Target(lesa_json.version, lesa_json.files, guards=True),
}


def export(
    forecaster: LesaForecaster,
    to: str,
    out: str | os.PathLike[str],
    *,
    full_steps: Sequence[int] | None = None,
    engine_version: str | None = None,
    request: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write step lists for another program; the files that were written.

    Args:
        to: "cache-dit" (a YAML file per list, for `cache_dit.load_configs`), "sglang" (a schedule
            of DPCache per list, for `--dpcache-schedule-dir`) or "json" (one file, by
            docs/step-lists.schema.json).
        out: the folder.
        full_steps: the counts of the lists; all calibrated ones by default.
        engine_version: of the program that will read them; by default the one installed here.
        request: SGLang's only: what its server runs, see `lesa.exchange.sglang`.

    Raises: LesaError, before anything is written, for an unknown program or version, a count that
        was not calibrated, and what the format cannot hold.
    """
    if to not in TARGETS:
        raise LesaError(f"to={shown(to)}: unknown; choose from {', '.join(TARGETS)}")
    target, folder = TARGETS[to], as_path(out, "out")
    target.version(engine_version)
    if request is not None and to != "sglang":
        raise LesaError(f"request: --to {to} asks for none; leave it out")
    lists = step_lists(forecaster, full_steps)
    made = target.files(lists, request or {})
    if target.alone:
        _check_alone(folder, made)
    require_writable(folder)
    if not target.guards:
        _tell_of_guards(lists, to)
    return [write_atomically(folder / name, text) for name, text in made.items()]


def _tell_of_guards(lists: Sequence[StepList], to: str) -> None:
    """Warn of lists that were measured with a guard, which the other program does not run."""
    guards = [f"{one.name} ({one.entry.guard.kind})" for one in lists if one.entry.guard]
    if guards:
        warn(
            f"guard: {to} runs lists without theirs, {', '.join(guards)}: there pictures at risk "
            "get no other steps and may come out worse than `lesa inspect` says"
        )


def _check_alone(folder: Path, made: Mapping[str, str]) -> None:
    there = sorted(path.name for path in folder.glob("*.json")) if folder.is_dir() else []
    if others := [name for name in there if name not in made]:
        raise LesaError(
            f"out={str(folder)!r}: it holds {others[0]}, which would be read as a schedule too; "
            "give a folder of its own"
        )
