"""The denoisers of a pipeline, under whatever names it keeps them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from lesa.errors import LesaError
from lesa.hooks.model_specs import has_row
from lesa.hooks.wrappers import core_of

__all__ = ["find_denoiser", "find_denoisers"]

_USUAL = ("transformer", "transformer_2", "unet")
_HOMES = ("diffusers.models.transformers.", "diffusers.models.unets.")
_TIMES = {"timestep", "timesteps", "timestep_ratio", "t", "time"}


def find_denoiser(pipe: Any) -> nn.Module:
    """The first of `find_denoisers`; a module is returned as it is."""
    return find_denoisers(pipe)[0]


def find_denoisers(pipe: Any) -> list[nn.Module]:
    """All modules that a pipeline denoises with.

    Those named `transformer`, `transformer_2` (Wan 2.2: low noise) and `unet` come first; then
    every other registered module of a denoiser's class: one of diffusers' transformers and U-Nets
    that takes a time, or a class with a row in `lesa.hooks.model_specs` (Ideogram's
    `unconditional_transformer`, Stable Cascade's `prior` and `decoder`).

    Raises:
        LesaError: there is none.
    """
    if isinstance(pipe, nn.Module):
        return [pipe]
    if isinstance(pipe, type):
        raise LesaError(
            f"pipe={pipe.__name__}: a class, not a pipeline; give one, as "
            f"{pipe.__name__}.from_pretrained(...)"
        )
    usual = [getattr(pipe, name, None) for name in _USUAL]
    others = [part for name, part in _registered(pipe) if is_denoiser(part)]
    models = [part for part in [*usual, *others] if isinstance(part, nn.Module)]
    if models:
        return list(dict.fromkeys(models))
    raise LesaError(
        f"pipe: {type(pipe).__name__} has no denoiser (a transformer or a unet); give a diffusers "
        "pipeline, or use lesa.apply_lesa_cache on the denoiser"
    )


def is_denoiser(module: Any) -> bool:
    """Whether a module is of a denoiser's class."""
    if not isinstance(module, nn.Module):
        return False
    core = core_of(module)
    if has_row(core):
        return True
    kind = type(core)
    takes_time = _TIMES.intersection(inspect.signature(kind.forward).parameters)
    return bool(takes_time) and kind.__module__.startswith(_HOMES)


def component_name(pipe: Any, module: nn.Module) -> str:
    """What the pipeline calls this module: "transformer"; its class where it has no name."""
    names = [name for name, part in _registered(pipe) if part is module]
    usual = [name for name in _USUAL if getattr(pipe, name, None) is module]
    return next(iter([*usual, *names]), type(core_of(module)).__name__)


def _registered(pipe: Any) -> Iterator[tuple[str, Any]]:
    """The components of a pipeline by name, without asking for those that are not there."""
    config = getattr(pipe, "config", None) or {}
    registered = [name for name, value in config.items() if isinstance(value, (list, tuple))]
    for name in registered:  # (library, class); diffusers warns where others are asked for so
        part = getattr(pipe, name, None)
        if isinstance(part, nn.Module):
            yield name, part
