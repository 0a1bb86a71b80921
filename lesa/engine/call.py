"""One call of the denoiser, as the engine sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

from lesa.errors import LesaError
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.step_clock import Step

__all__ = ["Call", "Refusal"]


class Call(NamedTuple):
    """One call of the denoiser."""

    denoiser: Denoiser
    step: Step
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def argument(self, name: str) -> Any:
        """Value of an argument of the forward, or None."""
        return self.denoiser.argument(name, self.args, self.kwargs)


class Refusal(LesaError):
    """Why one call cannot be forecast; the engine computes it in full."""
