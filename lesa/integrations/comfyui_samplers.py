"""What a sampler of ComfyUI and its sigmas tell of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lesa.hooks.generation import Generation
from lesa.hooks.noise_levels import own_noise_levels

__all__ = ["run_of_sampler"]

# By the names of its samplers: those that call the model more than once a step, add noise, or
# extrapolate over their steps.
_TWICE = (
    "sample_heun", "sample_dpm_2", "sample_dpmpp_2s", "sample_dpmpp_sde", "sample_seeds",
    "sample_sa_solver_pece", "dpm_fast", "dpm_adaptive",
)  # fmt: skip
_NOISY = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")
_MULTISTEP = ("2m", "3m", "lms", "ipndm", "deis", "multistep", "gradient", "unipc", "sa_solver")


def run_of_sampler(sampler: Any, sigmas: Sequence[float], sampling: Any) -> Generation:
    """What lesa must know of a run: its levels in [0, 1], and what kind of sampler it is."""
    flow = any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)
    levels = [sigma if flow else sigma / (1 + sigma) for sigma in sigmas]
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    run = Generation(num_steps=len(levels) - 1, times=tuple(sigmas), sampler=f"ComfyUI's {name}")
    run.noise = any(word in name for word in _NOISY)
    run.multistep = any(word in name for word in _MULTISTEP)
    if name.startswith(_TWICE):
        run.problem = f"{name} calls the model more than once a step"
    run.sigmas = own_noise_levels(run.num_steps, levels)
    return run
