"""What a config.json of a forecaster must hold: checked before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lesa.core.checks import shown
from lesa.core.forecaster import check_sigmas
from lesa.core.table import Table
from lesa.errors import LesaError
from lesa.forecasters.calibration import Calibration

__all__ = ["LARGEST_SUM", "check_calibration", "check_config"]

# Of the magnitudes of a row's coefficients. Trained rows stay below 12 on every embedded pipeline.
LARGEST_SUM = 1000.0

_FIELDS: dict[str, type] = {"metadata": dict, "settings": dict, "calibrated": list, "dtype": str}
_METADATA: dict[str, type] = {
    "model_class": str,
    "model_id": str,
    "model_hash": str,
    "scheduler": str,
    "prompts": int,
    "prompts_sha256": str,
    "seed": int,
    "call": dict,
}
_ENTRY: dict[str, type] = {"schedule": dict, "sigmas": list, "branches": list, "split": list}
_REMEDY = "copy the folder again, or train anew"


def check_config(config: Mapping[str, Any]) -> None:
    """LesaError for a field that is missing or of another type, metadata included."""
    _check(config, _FIELDS, "config", optional=())
    _check(config["metadata"], _METADATA, "metadata", optional=tuple(_METADATA))
    for i, entry in enumerate(config["calibrated"]):
        where = f"calibrated[{i}]"
        if not isinstance(entry, dict):
            raise LesaError(f"{where}={shown(entry)}: not an object; {_REMEDY}")
        _check(entry, _ENTRY, where, optional=("split",))
        for name in ("branches", "split"):
            for branch in entry.get(name, ()):
                if not isinstance(branch, str):
                    raise LesaError(f"{where}.{name}={shown(branch)}: not a text; {_REMEDY}")


def check_calibration(entry: Calibration, history: int, uses_latent: bool) -> None:
    """LesaError unless every stored row makes a table: its levels fall, its coefficients are finite
    and of a sum of magnitudes up to `LARGEST_SUM`, and weigh `history` features."""
    check_sigmas(entry.schedule, entry.sigmas)
    for branch, rows in entry.rows.items():
        table = Table(entry.schedule, rows, uses_latent, split=entry.split.get(branch))
        if table.history != history:
            raise LesaError(
                f"rows of {branch!r} weigh {table.history} features, settings have "
                f"history={history}; {_REMEDY}"
            )
        parts = [table.part(part).coefficients for part in range(table.parts)]
        largest = max(float(part.abs().sum(1).max()) for part in [table.coefficients, *parts])
        if largest > LARGEST_SUM:
            raise LesaError(
                f"rows of {branch!r}: coefficients of magnitude {largest:.3g} in one row, where "
                f"trained ones stay below {LARGEST_SUM:.0f}; {_REMEDY}"
            )


def _check(
    found: Mapping[str, Any], types: Mapping[str, type], where: str, optional: tuple[str, ...]
) -> None:
    for name, kind in types.items():
        value = found.get(name)
        if name in optional and value is None:
            continue
        if name not in found:
            raise LesaError(f"{where} has no {name}; {_REMEDY}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise LesaError(f"{where}.{name}={shown(value)}: not {_KINDS[kind]}; {_REMEDY}")


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
}
