"""A LesaForecaster as a folder: model.safetensors and a readable config.json, nothing pickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from lesa._version import __version__
from lesa.core.checks import shown
from lesa.core.forecaster import check_sigmas
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.config_check import (
    DTYPES,
    Tabled,
    check_config,
    check_moments,
    check_tables,
    check_tensors,
)
from lesa.forecasters.disca import MOST_BYTES, DiscaForm
from lesa.forecasters.guard import Guard
from lesa.forecasters.source import locate
from lesa.forecasters.worth import Worth
from lesa.util.files import as_path, named_path, one_line, read_file, write_atomically
from lesa.util.strict_json import parse_json, to_json
from lesa.util.tensor_file import read_tensors

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
MOST_CONFIG, MOST_WEIGHTS = 16 << 20, 256 << 20  # bytes; trained ones have under a megabyte
_GIVE = "give the folder that save_pretrained wrote"


class Storable(Tabled, Protocol):
    """What a folder holds of a forecaster: settings, origin, parameters and calibrated rows."""

    metadata: dict[str, Any]
    net: Any

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object: ...

    def to(self, dtype: torch.dtype) -> object: ...


Stored = TypeVar("Stored", bound=Storable)


def save(forecaster: Storable, folder: str | os.PathLike[str]) -> None:
    """Write the folder, which loads as the old forecaster or as this one at any moment.

    The weights hold the config too, and are written first: whoever finds them beside a config of
    other weights takes theirs. Other files in the folder stay as they are.

    Raises:
        LesaError: it is no path, the folder cannot be written, or the metadata are not JSON.
    """
    target = as_path(folder, "folder")
    config, tensors = _config(forecaster), _tensors(forecaster)
    try:
        own = to_json({**config, "tensors_sha256": _digest(tensors)})
    except (TypeError, ValueError, RecursionError) as error:
        raise LesaError(
            f"metadata: they cannot be written as JSON ({one_line(error)}); use plain values"
        ) from None
    weights = tensors_to_bytes(tensors, metadata={"lesa": json.dumps(json.loads(own))})
    text = to_json({**config, "weights_sha256": hashlib.sha256(weights).hexdigest()})
    # A list of numbers goes on one line; no text of the metadata has a line break in it.
    lists = re.compile(r"\[\n[\s\d.,e+-]+\]")
    text = lists.sub(lambda found: " ".join(found[0].split()), text)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / WEIGHTS, weights)
        write_atomically(target / CONFIG, text)
    except OSError as error:
        raise LesaError(
            f"folder={str(target)!r}: it cannot be written ({error.strerror}); give another folder"
        ) from None


def load(
    source: str | os.PathLike[str], make: Callable[..., Stored], revision: str | None = None
) -> Stored:
    """The forecaster in a folder or a Hugging Face Hub repository ("owner/name").

    Args:
        source: the folder, or the repository.
        make: the class of the forecaster, called with ``metadata`` and the stored settings.
        revision: branch, tag or commit of the repository; its main branch if None.

    Raises:
        LesaError: a file is missing, truncated or altered, of another format version, or does not
            fit its config, or a folder is given a revision; it names the file, what was found and
            the remedy.
    """
    config_path, weights_path = locate(source, (CONFIG, WEIGHTS), revision)
    name = named_path(config_path)
    config = _read_config(read_file(config_path, MOST_CONFIG, _GIVE), name)
    most = MOST_BYTES if _form(config) == "disca" else MOST_WEIGHTS
    weights = read_file(weights_path, most, _GIVE)
    whole = hashlib.sha256(weights).hexdigest() == config["weights_sha256"]
    try:
        tensors, metadata = read_tensors(weights, named_path(weights_path), "copy it again")
        if not whole:
            config = _own_config(tensors, metadata)
    except LesaError:
        if whole:
            raise
        raise LesaError(
            f"{named_path(weights_path)} ({len(weights)} bytes) is truncated or altered: its "
            f"sha256 is not the one in {CONFIG}; copy both files again or train anew"
        ) from None
    try:
        return _build(config, tensors, make)
    except LesaError as error:
        raise LesaError(f"{name}: {error}") from None
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise LesaError(
            f"{name} and {WEIGHTS} do not fit each other ({one_line(error)}); copy both again"
        ) from None


def _tensors(forecaster: Storable) -> dict[str, Tensor]:
    tensors = {k: v.detach().cpu().contiguous() for k, v in forecaster.state_dict().items()}
    for i, entry in enumerate(forecaster.calibrations):
        tensors |= {f"rows.{i}.{name}": rows.contiguous() for name, rows in entry.rows.items()}
        tensors |= {f"split.{i}.{name}": rows.contiguous() for name, rows in entry.split.items()}
        if (guard := entry.guard) is not None:
            own = {"rows": guard.rows, "split": guard.split}
            tensors |= {
                f"guard.{what}.{i}.{name}": rows.contiguous()
                for what, kept in own.items()
                for name, rows in kept.items()
            }
    return tensors | (forecaster.net.stored() if isinstance(forecaster.net, DiscaForm) else {})


def _config(forecaster: Storable) -> dict[str, Any]:
    parameter = next(forecaster.parameters(), torch.empty(0))
    return {
        "format_version": FORMAT_VERSION,
        "lesa_version": __version__,
        "metadata": forecaster.metadata,
        "settings": forecaster.settings.to_dict(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "calibrated": [
            {
                "full_steps": list(entry.schedule.full_steps),
                "schedule": entry.schedule.to_dict(),
                "sigmas": list(entry.sigmas),
                "branches": list(entry.rows),
                "split": list(entry.split),
                "worth": None if entry.worth is None else entry.worth.to_dict(),
                **({} if entry.guard is None else {"guard": entry.guard.to_dict()}),
            }
            for entry in forecaster.calibrations
        ],
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, dtypes, shapes and values, whatever file they are in."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _own_config(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The config that weights hold; LesaError where there is none, or it is of other tensors."""
    config = _read_config(metadata.get("lesa", "").encode(), WEIGHTS, "tensors_sha256")
    if config["tensors_sha256"] != _digest(tensors):
        raise LesaError(f"{WEIGHTS} holds other tensors than it says; copy it again")
    return config


def _read_config(data: bytes, name: str, digest: str = "weights_sha256") -> dict[str, Any]:
    """A config that says how it is to be read, and whose it is."""
    what = f"{name} is not the config of a forecaster"
    config = parse_json(data, what, "save it again")
    if not isinstance(config, dict) or not {"format_version", digest} <= config.keys():
        raise LesaError(f"{what} (it lacks format_version or {digest}); save it again")
    if (version := config["format_version"]) != FORMAT_VERSION:
        raise LesaError(
            f"{name} has format_version={shown(version)}, this lesa reads {FORMAT_VERSION}; "
            "install the lesa that wrote it or train anew"
        )
    return config


def _form(config: dict[str, Any]) -> Any:
    settings = config.get("settings")
    return settings.get("form") if isinstance(settings, dict) else None


def _build(
    config: dict[str, Any], tensors: dict[str, Tensor], make: Callable[..., Stored]
) -> Stored:
    check_config(config)
    check_tensors(tensors)
    dtype, given = DTYPES[config["dtype"]], {"metadata": config["metadata"], **config["settings"]}
    with torch.device("meta"):  # sizes that a config tells are compared before memory is taken
        planned = make(**given).state_dict()
    for name, value in planned.items():
        found = tensors[name]
        if found.shape != value.shape or found.dtype != dtype:
            told = f"{found.dtype} {list(found.shape)}, not {dtype} {list(value.shape)}"
            raise RuntimeError(f"{name} is {told}")
    forecaster = make(**given)
    forecaster.calibrations += [
        _calibration(i, listed, tensors) for i, listed in enumerate(config["calibrated"])
    ]
    if isinstance(forecaster.net, DiscaForm):
        forecaster.net.take(tensors)
    forecaster.to(dtype)
    forecaster.load_state_dict(tensors)
    check_moments(forecaster.moments)
    check_tables(forecaster)
    return forecaster


def _calibration(index: int, listed: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    """One calibrated list, whose rows leave the tensors of the file."""
    rows = {name: tensors.pop(f"rows.{index}.{name}") for name in listed["branches"]}
    split = {name: tensors.pop(f"split.{index}.{name}") for name in listed.get("split", [])}
    schedule = Schedule.from_dict(listed["schedule"])
    stored = listed.get("worth")
    worth = None if stored is None else Worth(**stored)
    sigmas, guard = check_sigmas(schedule, listed["sigmas"]), None
    if (kept := listed.get("guard")) is not None:
        guard = Guard.from_dict(
            kept,
            {name: tensors.pop(f"guard.rows.{index}.{name}") for name in kept.get("branches", [])},
            {name: tensors.pop(f"guard.split.{index}.{name}") for name in kept.get("split", [])},
        )
        guard.check(schedule, rows)
    return Calibration(schedule, sigmas, rows, split, worth, guard)
