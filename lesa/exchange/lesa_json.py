"""lesa's own JSON of step lists and tables, for programs that would run them without lesa.

Described by docs/step-lists.schema.json (JSON Schema 2020-12). `version` grows when a reader of the
old one could misread the new one; fields that are only added leave it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lesa._version import __version__
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.exchange.step_lists import StepList
from lesa.util.strict_json import to_json

__all__ = ["NAME", "VERSION", "document", "files", "version"]

NAME, VERSION = "lesa-step-lists", 1


def version(wanted: str | None) -> str:
    """The version that is written; LesaError for another one."""
    if wanted not in (None, str(VERSION)):
        raise LesaError(
            f"engine-version={wanted!r}: {NAME} is written in version {VERSION} only; leave it out"
        )
    return str(VERSION)


def files(lists: Sequence[StepList], request: Mapping[str, Any]) -> dict[str, str]:
    """One file."""
    return {"step-lists.json": to_json(document(lists))}


def document(lists: Sequence[StepList]) -> dict[str, Any]:
    """The lists of one forecaster as plain values.

    Raises: LesaError for form="disca", whose skipped steps run a network too.
    """
    forecaster = lists[0].forecaster
    if forecaster.form == "disca":
        raise LesaError(
            "form='disca': its skipped steps run a network, which step lists do not hold; "
            "export a forecaster of another form"
        )
    metadata = forecaster.metadata
    return {
        "schema": NAME,
        "version": VERSION,
        "lesa_version": __version__,
        "forecaster": {
            "name": forecaster.name,
            "tap": forecaster.tap,
            "uses_latent": forecaster.uses_latent,
            "branches": list(forecaster.branches),
        },
        "model": {key: metadata.get(f"model_{key}") for key in ("class", "id", "hash")},
        "scheduler": metadata.get("scheduler"),
        "call": dict(metadata.get("call") or {}),
        "lists": [_listed(one) for one in lists],
    }


def _listed(one: StepList) -> dict[str, Any]:
    worth, guard = one.entry.worth, one.entry.guard
    return {
        "num_steps": one.steps,
        "full_steps": list(one.full_steps),
        "sigmas": list(one.entry.sigmas),
        "worth": None if worth is None else worth.to_dict(),
        "tables": _tables(one, one.entry.schedule),
        "guard": None
        if guard is None
        else guard.described(one.entry.schedule)
        | {"tables": _tables(one, guard.schedule) if guard.kind == "route" else {}},
    }


def _tables(one: StepList, schedule: Schedule) -> dict[str, Any]:
    return {name: _table(one.table(name, schedule)) for name in one.forecaster.branches}


def _table(table: Table) -> dict[str, Any]:
    return {
        "history": table.history,
        "autoregressive": table.autoregressive,
        "coefficients": table.coefficients.tolist(),
        "bias": None if table.bias is None else table.bias.tolist(),
        "parts": [table.part(p).coefficients.tolist() for p in range(table.parts)]
        if table.parts > 1
        else None,
    }
