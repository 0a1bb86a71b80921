"""lesa: diffusion pipelines made faster by forecasting a model-level feature on most steps.

The names below are imported when first used, so that `import lesa` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lesa._version import __version__ as __version__

if TYPE_CHECKING:
    from lesa.api import (
        accelerate,
        apply_lesa_cache,
        disable,
        enable,
        patch_diffusers,
        remove_lesa_cache,
        stats,
    )
    from lesa.core.forecaster import Forecaster
    from lesa.core.schedule import Schedule
    from lesa.core.table import Table
    from lesa.engine.config import LesaConfig
    from lesa.engine.options import options
    from lesa.engine.slot import Slot
    from lesa.engine.stats import Stats
    from lesa.errors import LesaError
    from lesa.forecasters import FoCa, HiCache, Prior, Reuse, Spectrum, Taylor
    from lesa.forecasters.lesa import LesaForecaster
    from lesa.hooks.model_specs import ModelSpec, register_model
    from lesa.training.train import train


_HOME = {
    "accelerate": "api",
    "apply_lesa_cache": "api",
    "disable": "api",
    "enable": "api",
    "patch_diffusers": "api",
    "remove_lesa_cache": "api",
    "stats": "api",
    "LesaConfig": "engine.config",
    "options": "engine.options",
    "Slot": "engine.slot",
    "Stats": "engine.stats",
    "LesaError": "errors",
    "FoCa": "forecasters",
    "HiCache": "forecasters",
    "Prior": "forecasters",
    "Reuse": "forecasters",
    "Spectrum": "forecasters",
    "Taylor": "forecasters",
    "LesaForecaster": "forecasters.lesa",
    "ModelSpec": "hooks.model_specs",
    "register_model": "hooks.model_specs",
    "Forecaster": "core.forecaster",
    "Schedule": "core.schedule",
    "Table": "core.table",
    "train": "training.train",
}
_FOLDERS = ("evaluation", "forecasters", "testbed", "training")

__all__ = [
    "FoCa",
    "Forecaster",
    "HiCache",
    "LesaConfig",
    "LesaError",
    "LesaForecaster",
    "ModelSpec",
    "Prior",
    "Reuse",
    "Schedule",
    "Slot",
    "Spectrum",
    "Stats",
    "Table",
    "Taylor",
    "accelerate",
    "apply_lesa_cache",
    "disable",
    "enable",
    "options",
    "patch_diffusers",
    "register_model",
    "remove_lesa_cache",
    "stats",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"lesa.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lesa' has no attribute {name!r}")
    value = getattr(import_module(f"lesa.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
