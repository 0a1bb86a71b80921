"""A LesaForecaster as a folder: model.safetensors and a readable config.json, nothing pickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from lesa._version import __version__
from lesa.core.checks import shown
from lesa.core.forecaster import check_sigmas
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters.calibration import Calibration
from lesa.forecasters.config_check import check_calibration, check_config
from lesa.forecasters.settings import Settings
from lesa.util.files import write_atomically

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Storable(Protocol):
    """What a folder holds of a forecaster: settings, origin, parameters and calibrated rows."""

    settings: Settings
    metadata: dict[str, Any]
    calibrations: list[Calibration]

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object: ...

    def to(self, dtype: torch.dtype) -> object: ...


Stored = TypeVar("Stored", bound=Storable)


def save(forecaster: Storable, folder: str | os.PathLike[str]) -> None:
    """Write the folder; each file appears under its name only when it is complete.

    Raises:
        LesaError: the folder cannot be written, or the metadata are not JSON.
    """
    target = Path(folder)
    weights = tensors_to_bytes(_tensors(forecaster))
    try:
        config = json.dumps(_config(forecaster, weights), indent=2)
    except TypeError as error:
        raise LesaError(f"metadata cannot be written as JSON ({error}); use plain values") from None
    lists = re.compile(r"\[[\s\d.,e+-]+\]")  # a list of numbers goes on one line
    config = lists.sub(lambda found: " ".join(found[0].split()), config)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / WEIGHTS, weights)
        write_atomically(target / CONFIG, config + "\n")
    except OSError as error:
        raise LesaError(
            f"folder {str(target)!r} cannot be written ({error.strerror}); choose another one"
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
    config_path, weights_path = _locate(source, revision)
    config = _read_config(config_path)
    weights = _read(weights_path)
    if hashlib.sha256(weights).hexdigest() != config["weights_sha256"]:
        raise LesaError(
            f"{weights_path} ({len(weights)} bytes) is truncated or altered: its sha256 is not the "
            f"one in {CONFIG}; copy both files again or train anew"
        )
    try:
        return _build(config, tensors_from_bytes(weights), make)
    except SafetensorError as error:
        raise LesaError(
            f"{weights_path} is not a safetensors file ({error}); copy it again"
        ) from None
    except LesaError as error:
        raise LesaError(f"{config_path}: {error}") from None
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        told = " ".join(str(error).split())[:300]
        raise LesaError(
            f"{config_path} and {WEIGHTS} do not fit each other ({told}); copy both again"
        ) from None


def _tensors(forecaster: Storable) -> dict[str, Tensor]:
    tensors = {k: v.detach().cpu().contiguous() for k, v in forecaster.state_dict().items()}
    for i, entry in enumerate(forecaster.calibrations):
        tensors |= {f"rows.{i}.{name}": rows.contiguous() for name, rows in entry.rows.items()}
        tensors |= {f"split.{i}.{name}": rows.contiguous() for name, rows in entry.split.items()}
    return tensors


def _config(forecaster: Storable, weights: bytes) -> dict[str, Any]:
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
            }
            for entry in forecaster.calibrations
        ],
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }


def _build(
    config: dict[str, Any], tensors: dict[str, Tensor], make: Callable[..., Stored]
) -> Stored:
    check_config(config)
    dtype = DTYPES[config["dtype"]]
    calibrations = [
        _calibration(i, listed, tensors) for i, listed in enumerate(config["calibrated"])
    ]
    with torch.device("meta"):  # sizes that a config tells are compared before memory is taken
        planned = make(metadata=config["metadata"], **config["settings"])
    for name, planned_value in planned.state_dict().items():
        if name not in tensors or tensors[name].shape != planned_value.shape:
            found = list(tensors[name].shape) if name in tensors else "missing"
            raise RuntimeError(f"{name} is {found}, not {list(planned_value.shape)}")
    settings = planned.settings
    for entry in calibrations:
        check_calibration(entry, settings.history, bool(settings.uses_latent))
    forecaster = make(metadata=config["metadata"], **config["settings"])
    forecaster.calibrations += calibrations
    forecaster.to(dtype)
    forecaster.load_state_dict(tensors)
    return forecaster


def _calibration(index: int, listed: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    """One calibrated list, whose rows leave the tensors of the file."""
    rows = {name: tensors.pop(f"rows.{index}.{name}") for name in listed["branches"]}
    split = {name: tensors.pop(f"split.{index}.{name}") for name in listed.get("split", [])}
    schedule = Schedule.from_dict(listed["schedule"])
    return Calibration(schedule, check_sigmas(schedule, listed["sigmas"]), rows, split)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path))
        version, _ = config["format_version"], config["weights_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, LesaError):
            raise
        raise LesaError(
            f"{path} is not the config of a forecaster ({error}); save it again"
        ) from None
    if version != FORMAT_VERSION:
        raise LesaError(
            f"{path} has format_version={shown(version)}, this lesa reads {FORMAT_VERSION}; "
            "install the lesa that wrote it or train anew"
        )
    return config


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Whether this is not a folder here, but looks like "owner/name"."""
    text = os.fspath(source)  # os.path, since Path.is_dir raises where a name is too long
    return not os.path.isdir(text) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(text)))


def _locate(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, Path]:
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise LesaError(f"source={source!r}: not a folder or Hub id; give a path or 'owner/name'")
    if revision is not None and not isinstance(revision, str):
        raise LesaError(f"revision={revision!r}: not a text; give a branch, tag or commit")
    if not is_hub_id(source):
        if revision is not None:
            raise LesaError(
                f"revision={revision!r}: {str(source)!r} is not the id of a Hub repository, and "
                "nothing else has revisions; leave it out"
            )
        return Path(source) / CONFIG, Path(source) / WEIGHTS
    from huggingface_hub import hf_hub_download

    try:
        found = [
            Path(hf_hub_download(str(source), name, revision=revision))
            for name in (CONFIG, WEIGHTS)
        ]
    except (OSError, ValueError) as error:  # every hub error is one of the two
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        at = "" if revision is None else f" at revision {revision!r}"
        raise LesaError(
            f"{str(source)!r} is not a folder here and cannot be loaded from the Hub{at} ({told}); "
            "check the name or the network"
        ) from None
    return found[0], found[1]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise LesaError(
            f"{path} cannot be read ({reason}); give the folder that save_pretrained wrote"
        ) from None
