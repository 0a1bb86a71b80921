"""lesa: diffusion pipelines made faster by forecasting a model-level feature on most steps.

The names below are imported when first used, so that `import lesa` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    from lesa.config import LesaConfig
    from lesa.counters import Stats
    from lesa.errors import LesaError
    from lesa.forecasters import FoCa, HiCache, Reuse, Spectrum, Taylor
    from lesa.forecasters.lesa import LesaForecaster
    from lesa.models import ModelSpec, register_model
    from lesa.schedule import Schedule
    from lesa.table import Table
    from lesa.training.train import train

__version__ = "0.1.0"

_HOME = {
    "accelerate": "api",
    "apply_lesa_cache": "api",
    "disable": "api",
    "enable": "api",
    "patch_diffusers": "api",
    "remove_lesa_cache": "api",
    "stats": "api",
    "LesaConfig": "config",
    "Stats": "counters",
    "LesaError": "errors",
    "FoCa": "forecasters",
    "HiCache": "forecasters",
    "Reuse": "forecasters",
    "Spectrum": "forecasters",
    "Taylor": "forecasters",
    "LesaForecaster": "forecasters.lesa",
    "ModelSpec": "models",
    "register_model": "models",
    "Schedule": "schedule",
    "Table": "table",
    "train": "training.train",
}
_FOLDERS = ("evaluation", "forecasters", "testbed", "training")

__all__ = [
    "FoCa",
    "HiCache",
    "LesaConfig",
    "LesaError",
    "LesaForecaster",
    "ModelSpec",
    "Reuse",
    "Schedule",
    "Spectrum",
    "Stats",
    "Table",
    "Taylor",
    "accelerate",
    "apply_lesa_cache",
    "disable",
    "enable",
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
