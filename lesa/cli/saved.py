"""What can be read of a saved pipeline before it is loaded: its class and its scheduler."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.cli.inputs import TESTBED, embedded_name, first_line, quieten
from lesa.cli.names import did_you_mean
from lesa.errors import LesaError
from lesa.forecasters.source import from_hub
from lesa.util.files import read_file
from lesa.util.strict_json import parse_json

__all__ = ["Saved", "look_at"]

_INDEX, _SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
_GIVE = f"give a folder saved with save_pretrained, a hub id, or {TESTBED}"


@dataclass(frozen=True)
class Saved:
    """A pipeline that is there: its diffusers class, the class of its denoiser by name and the
    config of its scheduler, None where they cannot be told beforehand; `embedded` is its name among
    the embedded ones."""

    name: str
    embedded: str | None = None
    kind: type | None = None
    denoiser: str | None = None
    scheduler: dict[str, Any] | None = None

    def check_forecaster(self, forecaster: Any) -> None:
        """LesaError if it was trained for another class of denoisers than this pipeline has."""
        if self.denoiser is not None and hasattr(forecaster, "check_model"):
            forecaster.check_model(self.denoiser)

    def outline(self) -> Any:
        """A pipeline of the same classes by name, without weights, for questions that these answer;
        None where they are not known."""
        if self.kind is None or self.denoiser is None:
            return None
        from torch import nn

        part = "unet" if "UNet" in self.denoiser else "transformer"
        return type(self.kind.__name__, (), {part: type(self.denoiser, (nn.Module,), {})()})()


def look_at(name: str) -> Saved:
    """What a pipeline is, by its name on the command line.

    Raises: LesaError where nothing of this name can be loaded.
    """
    quieten()
    if (embedded := embedded_name(name)) is not None:
        from lesa import testbed

        folders = testbed.folders(embedded)
        found = {file: _first(folders, file) for file in (_INDEX, _SCHEDULER)}
    elif os.path.exists(name) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        found = _local(name)
    else:
        found = _hub(name)
    index = found[_INDEX] or {}
    return Saved(name, embedded, _class(index), _denoiser(index), found[_SCHEDULER])


def _local(name: str) -> dict[str, Any]:
    folder = Path(name)
    if not os.path.exists(folder):  # unlike Path's, it never raises
        from lesa import testbed

        near = did_you_mean(name, [TESTBED, *testbed.PIPELINES])
        raise LesaError(f"pipeline={name!r}: no such folder, nor embedded{near}; {_GIVE}")
    if not folder.is_dir():
        raise LesaError(f"pipeline={name!r}: cannot load it (it is a file, no folder); {_GIVE}")
    if not (folder / _INDEX).is_file():
        raise LesaError(f"pipeline={name!r}: cannot load it (no {_INDEX} in it); {_GIVE}")
    return {file: _read(folder / file) for file in (_INDEX, _SCHEDULER)}


def _hub(name: str) -> dict[str, Any]:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    found: dict[str, Any] = {}
    for file in (_INDEX, _SCHEDULER):
        try:
            found[file] = _read(from_hub(name, file))
        except (OSError, ValueError, EntryNotFoundError) as error:
            here = isinstance(error, EntryNotFoundError)
            if file == _SCHEDULER and here and not isinstance(error, LocalEntryNotFoundError):
                found[file] = None  # the pipeline may have none
                continue
            raise LesaError(
                f"pipeline={name!r}: no folder here, and not to be had from the hub"
                f" ({first_line(error)}); {_GIVE}"
            ) from None
    return found


def _first(folders: tuple[Path, ...], file: str) -> dict[str, Any] | None:
    return next((_read(folder / file) for folder in folders if (folder / file).exists()), None)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where it is another thing, which loading the pipeline will explain."""
    try:
        found = parse_json(read_file(path, 16 << 20, ""), str(path), "")
    except LesaError:
        return None
    return found if isinstance(found, dict) else None


def _class(index: dict[str, Any]) -> type | None:
    """The class of diffusers that the index names."""
    import diffusers

    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    return kind if isinstance(kind, type) else None


def _denoiser(index: dict[str, Any]) -> str | None:
    """The name of the first denoiser's class, as the index has it: a library and a class."""
    for part in ("transformer", "unet"):
        match index.get(part):
            case [_, str(name)]:
                return name
    return None
