"""What makes forecasts worth less: a sampler that adds noise, or extrapolates over its steps."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["adds_noise", "is_multistep"]

# What diffusers calls the samplers that draw noise at every step.
_DRAWS = (
    "Ancestral",
    "CogVideoXDPM",
    "Cosine",
    "DDPM",
    "LCM",
    "RePaint",
    "SASolver",
    "SCM",
    "SDE",
    "SdeVe",
    "StochasticIterative",
    "UnCLIP",
)
# What it calls those that build a step from the outputs of earlier ones.
_EXTRAPOLATES = ("DPMSolver", "UniPC", "DEIS", "LMS", "PNDM", "SASolver")


def is_multistep(scheduler: Any) -> bool:
    """Whether a diffusers scheduler extrapolates over its steps, by its class and its order."""
    order = getattr(scheduler, "config", {}).get("solver_order") or 2
    return order > 1 and any(word in type(scheduler).__name__ for word in _EXTRAPOLATES)


def adds_noise(scheduler: Any, names: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler draws noise at its steps, by its class, its configuration and
    the `eta` of the pipeline's call with these arguments or local variables."""
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if any(word in kind for word in _DRAWS) or config.get("stochastic_sampling", False):
        return True
    if "sde" in str(config.get("algorithm_type", "")):
        return True
    try:
        eta = inspect.signature(scheduler.step).parameters.get("eta")
    except (AttributeError, TypeError, ValueError):
        return False
    if eta is None:
        return False
    told = names.get("eta", eta.default)
    return isinstance(told, (int, float)) and told > 0
