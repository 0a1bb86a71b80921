"""The denoisers of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from lesa.errors import LesaError


def find_denoiser(pipe: Any) -> nn.Module:
    """The `transformer` or `unet` of a pipeline; a module is returned as it is."""
    return find_denoisers(pipe)[0]


def find_denoisers(pipe: Any) -> list[nn.Module]:
    """All of them: Wan 2.2 has one transformer for high noise and one for low, or one of them."""
    if isinstance(pipe, nn.Module):
        return [pipe]
    parts = [getattr(pipe, name, None) for name in ("transformer", "transformer_2", "unet")]
    models = [part for part in parts if isinstance(part, nn.Module)]
    if models:
        return models
    raise LesaError(
        f"pipe: {type(pipe).__name__} has neither a transformer nor a unet; give a diffusers "
        "pipeline, or use lesa.apply_lesa_cache on the denoiser."
    )
