"""`lesa compare --submit FILE`: a comparison that others can check, of a source that they have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lesa.cli.output import say
from lesa.cli.recipe import SHARED, recipe_names
from lesa.cli.requests import CompareRequest
from lesa.errors import LesaError
from lesa.util.files import require_new_file, write_atomically
from lesa.util.source import require_source
from lesa.util.strict_json import to_json

if TYPE_CHECKING:
    from lesa.cli.saved import Saved
    from lesa.evaluation.submission import Subject

__all__ = ["subject_of", "submit"]

# Of a request: told elsewhere in the file, or a matter of the machine where it was made.
_TOLD = {"pipeline", "config", "prompts", "calibration", "forecaster", "seed", "batch_size"}
_OUTPUT = {"json", "report", "submit"}


def subject_of(
    request: CompareRequest,
    saved: Saved,
    num_inference_steps: int,
    calibration: Sequence[str],
    forecaster: Any,
) -> Subject | None:
    """What will be measured; None without --submit.

    Raises: LesaError where the file is there or cannot be written, and where the source is not the
        one of a commit.
    """
    if request.submit is None:
        return None
    from lesa.evaluation.submission import Subject

    require_new_file(request.submit, "submit")
    return Subject(
        source=require_source(f"submit={str(request.submit)!r}"),
        pipeline=_named(saved),
        recipe=_recipe(request, num_inference_steps),
        options=_options(request),
        batch_size=request.batch_size,
        calibration=calibration,
        forecaster=_forecaster(request.forecaster, forecaster),
    )


def submit(path: Path | None, found: Any, console: Console) -> None:
    """Write the file, if one was asked for: what the command found has it as "submission".

    Raises: LesaError where somebody wrote it, or changed the source, while the measurement ran.
    """
    if path is None:
        return
    field, document = f"submit={str(path)!r}", found["submission"]
    require_new_file(path, "submit")
    if vars(require_source(field)) != document["source"]:
        raise LesaError(f"{field}: another commit was checked out meanwhile; measure anew")
    write_atomically(path, to_json(document))
    say(console, f"submission: {path}")


def _named(saved: Saved) -> str:
    """A pipeline without the place where it lies on this machine."""
    if saved.embedded is not None:
        return f"testbed:{saved.embedded}"
    return Path(saved.name).resolve().name if os.path.exists(saved.name) else saved.name


def _recipe(request: CompareRequest, num_inference_steps: int) -> dict[str, Any] | None:
    """Which recipe the options came from, and what was run in place of its own: of the steps too,
    which a forecaster or the command says, since a recipe may train for several numbers of them."""
    if request.config is None:
        return None
    recipe = request.config
    name = recipe.path.stem
    own = name in recipe_names()
    other = [
        key
        for key, value in recipe.options.items()
        if key in SHARED and _plain(getattr(request, key)) != _plain(value)
    ]
    steps = recipe.options.get("num_inference_steps")
    if steps is not None and str(num_inference_steps) not in steps.replace(" ", "").split(","):
        other.append("num_inference_steps")
    return {
        "name": name if own else recipe.path.name,
        "own": own,
        "sha256": _sha256(recipe.path),
        "overridden": sorted(other),
    }


def _options(request: CompareRequest) -> dict[str, Any]:
    """What was asked for besides, where it is not the default."""
    given = {
        field.name: getattr(request, field.name)
        for field in fields(request)
        if field.name not in _TOLD | _OUTPUT and getattr(request, field.name) != field.default
    }
    return {key: _plain(value) for key, value in given.items()}


def _plain(value: Any) -> Any:
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value


def _forecaster(source: str | None, forecaster: Any) -> dict[str, Any] | None:
    """Its name, and the hashes of its files; none of a method that has no files."""
    if source is None:
        return None
    from lesa.forecasters.checkpoint import CONFIG, WEIGHTS
    from lesa.forecasters.source import locate

    trained = hasattr(forecaster, "save_pretrained")
    paths = locate(source, (WEIGHTS, CONFIG), None) if trained else [None, None]
    hashes = [None if path is None else _sha256(path) for path in paths]
    return {"name": forecaster.name, **dict(zip(("sha256", "config_sha256"), hashes, strict=True))}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
