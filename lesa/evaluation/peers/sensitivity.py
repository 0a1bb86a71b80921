"""How sensitive a model's output is to its latent and its time, measured on plain runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lesa.errors import LesaError
from lesa.evaluation.method import Bench
from lesa.evaluation.peers.controller import StepCache, controlled
from lesa.evaluation.peers.per_run_cache import once_per_bench
from lesa.evaluation.peers.thresholds import mean_full_steps
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.outputs import read_sample
from lesa.hooks.step_clock import Step

__all__ = ["Sensitivities", "Sensitivity", "moment", "sensitivities"]

_TIME = "timestep"
_TINY = 1e-12


class Sensitivity(NamedTuple):
    """How much the output of a step moves per change of the latent, and per change of the time."""

    latent: float
    time: float


Sensitivities = Mapping[str, list[Sensitivity]]  # guidance branch -> [S]


def moment(denoiser: Denoiser, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, float]:
    """The latent of a call and the time that the model is told.

    Raises: LesaError where the model takes no such time.
    """
    time = denoiser.argument(_TIME, args, kwargs)
    latent = denoiser.latent(args, kwargs)
    if not isinstance(time, Tensor) or not isinstance(latent, Tensor):
        name = denoiser.original_class.__name__
        raise LesaError(f"model: {name} takes no {_TIME} and latent as tensors; leave this out")
    return latent, float(time.flatten()[0])


@dataclass
class _Before:
    """The call of the step before."""

    call: dict[str, Any] = field(default_factory=dict)
    latent: Tensor = field(default_factory=Tensor)
    time: float = 0.0
    output: Tensor | None = None


class _Probe(StepCache[_Before]):
    """Runs every step in full and, once the next latent and time are known, each alone with the
    other one as it was: two further runs of the model per step."""

    def __init__(self, model: nn.Module, found: dict[str, list[list[Sensitivity]]]) -> None:
        super().__init__(model)
        self._found = found

    def begin(self) -> _Before:
        return _Before()

    def step(
        self, denoiser: Denoiser, step: Step, state: _Before, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        call = dict(denoiser.named(args, kwargs))
        latent, time = moment(denoiser, args, kwargs)
        runs = self._found.setdefault(step.branch, [])
        if step.fresh or state.output is None:
            runs.append([])
        else:
            runs[-1].append(self._sensitivity(denoiser, state, call, latent, time))
        self.full_calls += 1
        output = denoiser.run((), call).output
        state.call, state.latent, state.time = call, latent.clone(), time
        state.output = read_sample(output)
        return output

    def _sensitivity(
        self, denoiser: Denoiser, state: _Before, call: dict[str, Any], latent: Tensor, time: float
    ) -> Sensitivity:
        name = self.spec.latent
        known = {**state.call, name: state.latent}

        def change(**changed: Any) -> float:
            sample = read_sample(denoiser.run((), {**known, **changed}).output)
            assert sample is not None and state.output is not None
            return float((sample - state.output).norm())

        return Sensitivity(
            change(**{name: latent}) / max(float((latent - state.latent).norm()), _TINY),
            change(**{_TIME: call[_TIME]}) / max(abs(time - state.time), _TINY),
        )


@once_per_bench
def sensitivities(bench: Bench) -> Sensitivities:
    """a_x and a_t of every step and guidance branch, mean over plain runs of a few calibration
    prompts; the last step has those of the one before."""
    found: dict[str, list[list[Sensitivity]]] = {}
    mean_full_steps(bench, lambda pipe: controlled(pipe, lambda model: _Probe(model, found)))
    means: dict[str, list[Sensitivity]] = {}
    for branch, runs in found.items():
        mean = torch.tensor(runs, dtype=torch.float64).mean(0).tolist()
        means[branch] = [Sensitivity(*pair) for pair in (*mean, mean[-1])]
    return means
