"""Checkpoints of the paper authors' release, read without running anything that is in them.

Layout: github caipeiliang2004/LESA at 1f30861 (MIT), predictor/model/{predictor,kan}.py. A file is
{"config", "model", "optimizer", "scheduler"}; "model" holds, per guidance branch and stage, a
Linear(K, 1) over the last K features, oldest first, and a KAN [S + 1, hidden, hidden, 1].
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.util.files import named_path, one_line, read_file

__all__ = ["BROKEN", "Gate", "Released", "read_release"]

MOST = 1 << 30  # bytes; one of FLUX, with its optimizer, has 25 MB
STAGES, LAYERS, ORDER = 3, 3, 3
GRID = (-3.0, 3.0)
ROUNDING = 2**-7  # of a grid that was stored in bfloat16
_SUFFIXES = {"": "cond", "_cond": "cond", "_uncond": "uncond"}
_PREFIXES = ("module.", "model.", "_orig_mod.")
_CONFIGS = ("Config", "ModelConfig", "KANConfig", "SolverConfig")
_GIVE = "give a file that the release's train.py wrote, or train anew with --form paper"
BROKEN = (  # what torch.load raises for a file of anything
    *(pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(EOFError, OSError, MemoryError, OverflowError, struct.error),
)


class _Inert:
    """Stands for the release's config classes, of which nothing is asked."""


@dataclass(frozen=True)
class Gate:
    """One expert, in float32: w [K], newest first, b, and per layer of its KAN the weights of the
    SiLU [outputs, inputs] and of the splines [outputs, inputs, intervals + 3]."""

    w: Tensor
    b: float
    layers: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Released:
    """A checkpoint: its experts by guidance branch, from high noise to low."""

    branches: dict[str, tuple[Gate, ...]]

    @property
    def first(self) -> Gate:
        """One of them, for sizes that all share."""
        return next(iter(self.branches.values()))[0]

    @property
    def steps(self) -> int:
        """S, the steps of the runs that it was trained on."""
        return self.first.layers[0][0].shape[1] - 1

    @property
    def hidden(self) -> int:
        """Both inner widths of the KANs."""
        return self.first.layers[0][0].shape[0]

    @property
    def intervals(self) -> int:
        """Of every spline's grid."""
        return self.first.layers[0][1].shape[-1] - ORDER

    @property
    def windows(self) -> tuple[int, ...]:
        """K of each stage."""
        return tuple(len(gate.w) for gate in next(iter(self.branches.values())))


def read_release(path: str | os.PathLike[str]) -> Released:
    """The experts in a checkpoint of the release.

    Raises: LesaError where it is no such file, lacks a tensor, or has one of another shape, values
        that are not finite, or spline grids that were moved.
    """
    name = named_path(path)
    tensors = _tensors(_loaded(read_file(path, MOST, _GIVE), name), name)
    suffixes = sorted(
        {key.split(".")[0].removeprefix("latent") for key in tensors if key.startswith("latent")}
    )
    if suffixes not in ([""], ["_cond", "_uncond"]):
        raise LesaError(f"{name} is no checkpoint of the release (no latent.0.weight); {_GIVE}")
    found = {}
    try:
        for suffix in suffixes:
            gates = tuple(_gate(tensors, suffix, stage) for stage in range(STAGES))
            found[_SUFFIXES[suffix]] = gates
        _check_sizes(found)
    except KeyError as missing:
        raise LesaError(f"{name} has no tensor {missing}; {_GIVE}") from None
    except ValueError as error:
        raise LesaError(f"{name}: {error}; {_GIVE}") from None
    return Released(found)


def _loaded(data: bytes, name: str) -> Any:
    """What torch.save wrote, tensors and plain values only."""
    known: list[Any] = [(_Inert, f"predictor.model.config.{config}") for config in _CONFIGS]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except BROKEN as error:
        outside = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it names {outside[1]}, which is not loaded" if outside else one_line(error, 120)
        raise LesaError(
            f"{name} is no checkpoint of tensors and plain values ({why}); {_GIVE}"
        ) from None


def _tensors(loaded: Any, name: str) -> dict[str, Tensor]:
    """The parameters by their own names, in float32."""
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping):
        raise LesaError(f"{name} holds no parameters; {_GIVE}")
    found = {}
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor) and value.is_floating_point():
            own = next((key[len(p) :] for p in _PREFIXES if key.startswith(p)), key)
            found[own] = value.detach().float()
    return found


def _gate(tensors: Mapping[str, Tensor], suffix: str, stage: int) -> Gate:
    weight = tensors[f"latent{suffix}.{stage}.weight"]
    bias = tensors[f"latent{suffix}.{stage}.bias"]
    if weight.ndim != 2 or len(weight) != 1 or bias.shape != (1,):
        raise ValueError(f"latent{suffix}.{stage} is {list(weight.shape)}, not a Linear(K, 1)")
    layers = tuple(_layer(tensors, f"timestep{suffix}.{stage}.layers.{i}") for i in range(LAYERS))
    if not all(bool(value.isfinite().all()) for value in (weight, bias, *sum(layers, ()))):
        raise ValueError(f"stage {stage} holds values that are not finite")
    return Gate(weight[0].flip(0), float(bias), layers)


def _layer(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    base, spline = tensors[f"{name}.base_weight"], tensors[f"{name}.spline_weight"]
    if base.ndim != 2 or spline.shape[:-1] != base.shape or spline.shape[-1] <= ORDER:
        raise ValueError(f"{name} is {list(base.shape)} and {list(spline.shape)}, no spline layer")
    if (scaler := tensors.get(f"{name}.spline_scaler")) is not None:
        if scaler.shape != base.shape:
            raise ValueError(f"{name}.spline_scaler is {list(scaler.shape)}")
        spline = spline * scaler[..., None]
    _check_grid(tensors[f"{name}.grid"], spline.shape[-1] - ORDER, name)
    return base, spline


def _check_grid(grid: Tensor, intervals: int, name: str) -> None:
    """ValueError unless the knots are the even ones on [-3, 3], as far as bfloat16 tells."""
    width = (GRID[1] - GRID[0]) / intervals
    knots = torch.arange(-ORDER, intervals + ORDER + 1) * width + GRID[0]
    if grid.ndim != 2 or grid.shape[-1] != len(knots):
        raise ValueError(f"{name}.grid is {list(grid.shape)} for {intervals} intervals")
    if bool(((grid - knots).abs() > ROUNDING * knots.abs().clamp(min=1)).any()):
        raise ValueError(f"{name}.grid is not the even one on [-3, 3]: it was moved in training")


def _check_sizes(found: Mapping[str, tuple[Gate, ...]]) -> None:
    """ValueError unless all KANs are [S + 1, hidden, hidden, 1] of one size, windows alike."""
    gates = [gate for branch in found.values() for gate in branch]
    shapes = {tuple(tuple(spline.shape) for _, spline in gate.layers) for gate in gates}
    (hidden, inputs, basis), *_ = next(iter(shapes))
    wanted = ((hidden, inputs, basis), (hidden, hidden, basis), (1, hidden, basis))
    if shapes != {wanted} or inputs < 2:
        raise ValueError(f"its KANs have the layers {sorted(shapes)}, not [S + 1, h, h, 1]")
    if len({tuple(len(gate.w) for gate in branch) for branch in found.values()}) > 1:
        raise ValueError("its branches have windows of different widths")
