"""The engines that lesa is put into: imported when asked for, and only where lesa knows them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from lesa.errors import LesaError

__all__ = ["engine"]


def engine(module: str, series: str, install: str, *parts: str) -> ModuleType:
    """An engine's package, with these of its modules imported.

    Args:
        module: its name.
        series: what its version begins with, where the adapter knows one series only; "" else.
        install: what pip installs.
        parts: modules below it that the adapter uses.

    Raises:
        LesaError: it is not installed, cannot be imported, or is of another series.
    """
    try:
        found = import_module(module)
        for part in parts:
            import_module(f"{module}.{part}")
    except ImportError as error:
        raise LesaError(f"{module}: {error}; run pip install '{install}'") from None
    version = str(getattr(found, "__version__", ""))
    if series and not version.startswith(f"{series}."):
        raise LesaError(
            f"{module}={version}: the adapter knows {series}; run pip install '{install}'"
        )
    return found
