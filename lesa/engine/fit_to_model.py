"""Whether a configuration serves a model: asked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lesa.engine.config import LesaConfig
from lesa.engine.controller import CacheController
from lesa.engine.predicted import check_predictor
from lesa.errors import LesaError
from lesa.hooks.attach import attached, refuse_other_cache
from lesa.hooks.model_specs import model_spec
from lesa.hooks.wrappers import core_of
from lesa.ops import backend
from lesa.util.warn import warn

__all__ = ["check_model", "controller_of", "left_out", "unguarded", "with_tap_of"]


def left_out(models: Sequence[nn.Module], config: LesaConfig) -> dict[nn.Module, str]:
    """The denoisers of a pipeline that the configuration does not serve, and why; none where it
    serves none of them, which is an error that `check_model` and `with_tap_of` tell."""
    reasons = {model: reason for model in models if (reason := _unserved(model, config))}
    return reasons if len(reasons) < len(models) else {}


def _unserved(model: nn.Module, config: LesaConfig) -> str | None:
    spec, asked = model_spec(core_of(model)), config.tap or config.forecaster.tap
    trained = getattr(config.forecaster, "metadata", {}).get("model_class", spec.name)
    if trained != spec.name:
        return f"the forecaster was trained for {trained}, this is a {spec.name}"
    if asked is not None and asked not in spec.taps:
        return f"{spec.name} has no {asked} tap"
    return None


def with_tap_of(model: nn.Module, config: LesaConfig) -> LesaConfig:
    """The configuration with a tap that the model has; LesaError if another one is asked for."""
    spec = model_spec(core_of(model))
    if config.resolved_tap in spec.taps:
        return config
    if config.tap or config.forecaster.tap:
        raise LesaError(
            f"tap={config.resolved_tap!r}: {spec.name} does not have it ({spec.notes}); "
            f"use {' or '.join(map(repr, spec.taps))}"
        )
    return replace(config, tap=spec.taps[0])


def check_model(model: nn.Module, config: LesaConfig) -> None:
    """LesaError if this model cannot be accelerated, or not by this forecaster."""
    backend.wanted()
    core = core_of(model)
    spec = model_spec(core)
    spec.check(core)
    if attached(model) is not None:
        controller_of(model)
    refuse_other_cache(model)
    forecaster: Any = config.forecaster
    if hasattr(forecaster, "check_model"):
        forecaster.check_model(spec.name, tap=config.resolved_tap)
    check_predictor(core, config)


def controller_of(model: nn.Module) -> CacheController:
    """The engine at work on a model; LesaError where there is none, or training is at work."""
    denoiser = attached(model)
    if denoiser is None:
        raise LesaError(f"pipe: {type(model).__name__} is not accelerated; call lesa.enable first")
    if not isinstance(denoiser.controller, CacheController):
        raise LesaError(
            f"pipe: a {type(denoiser.controller).__name__} is at work on its denoiser; "
            "wait for its end"
        )
    return denoiser.controller


def unguarded(config: LesaConfig) -> LesaConfig:
    """The same for loops that do not change their list: without a guard.

    LesaError where one was asked for, a warning where the forecaster has one.
    """
    if config.guard not in (None, "off"):
        raise LesaError(
            f"guard={config.guard!r}: only lesa.enable runs guards, this engine does not; leave it "
            "out"
        )
    entries = getattr(config.forecaster, "calibrations", ())
    if config.guard is None and any(entry.guard for entry in entries):
        warn(
            f"guard: {config.forecaster.name} has one, which only lesa.enable runs; here pictures "
            "at risk may come out worse than `lesa inspect` says"
        )
    return replace(config, guard="off")
