"""SenCache: skip while latent and time have moved less than the model's output is sensitive to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation.method import Bench, Method, Peer
from lesa.evaluation.peers.controller import StepCache, controlled
from lesa.evaluation.peers.layouts import unfit_layout
from lesa.evaluation.peers.per_run_cache import once_per_bench
from lesa.evaluation.peers.residual import Residual, ResidualCache
from lesa.evaluation.peers.thresholds import (
    Applied,
    adaptive,
    mean_full_steps,
    needs_calibration,
)
from lesa.hooks.denoiser import Denoiser, read_sample
from lesa.hooks.step_clock import Step

__all__ = ["SENSITIVE", "SenCache", "Sensitivity", "sencache", "sensitivities"]

IN_A_ROW = 10  # skipped steps at most, as in the released script
_TIME = "timestep"
_TINY = 1e-12


class Sensitivity(NamedTuple):
    """How much the output of a step moves per change of the latent, and per change of the time."""

    latent: float
    time: float


Sensitivities = Mapping[str, list[Sensitivity]]  # guidance branch -> [S]


@dataclass
class _State(Residual):
    latent: Tensor | None = None
    time: float = 0.0
    at: int = 0


class SenCache(ResidualCache[_State]):
    """Skipped while (a_x |x_s - x_p| + a_t |t_s - t_p|) / sqrt(N) < threshold; h_hat_s = x_s + r_p.

    p is the last full step, a_x and a_t are the output's calibrated sensitivities there, norms are
    Euclidean over the N elements of the latent, t is the model's own time. The released code has a
    second threshold for the first fifth of the run, 44 times smaller in its example, and lets the
    prompt's branch decide for both; here one threshold holds for all steps, as in the formula, and
    each guidance branch decides for itself. The sensitivities are taken on plain runs of the
    calibration prompts, not on noised data.
    Source: SenCache (arXiv 2602.24208).

    longest: how many steps in a row are skipped at most.
    """

    def __init__(
        self, model: nn.Module, threshold: float, known: Sensitivities, longest: int
    ) -> None:
        super().__init__(model)
        self._threshold, self._known, self._longest = threshold, known, longest

    def begin(self) -> _State:
        return _State()

    def step(
        self, denoiser: Denoiser, step: Step, state: _State, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        latent, time = moment(denoiser, args, kwargs)
        near = step.index - state.at <= self._longest
        if state.latent is not None and near:
            moved = float((latent - state.latent).norm()), abs(time - state.time)
            per_change = self._known[step.branch][state.at]
            expected = sum(a * b for a, b in zip(per_change, moved, strict=True))
            if expected / latent.numel() ** 0.5 < self._threshold:
                return self.reuse(denoiser, state, args, kwargs)
        state.latent, state.time, state.at = latent.clone(), time, step.index
        return self.compute(denoiser, state, args, kwargs)[0]


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


def sencache(threshold: float, known: Sensitivities, longest: int) -> Applied:
    """Pipeline -> the context manager that puts SenCache on it; see `SenCache`."""
    return lambda pipe: controlled(pipe, lambda model: SenCache(model, threshold, known, longest))


@dataclass(frozen=True)
class SenCachePeer:
    """SenCache at the threshold that spends the wanted number of full steps.

    At most 10 steps in a row are skipped, the default of the released script, unless `wanted` rules
    that out. (Its example of 3 would leave an even list at 13 of 50 full steps, and none below.)
    """

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It looks into the blocks, and needs prompts for sensitivities and threshold."""
        return unfit_layout(bench) or needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The threshold with the fewest full steps that are not below `wanted` in the mean."""
        steps = bench.num_steps
        longest = IN_A_ROW if wanted * (IN_A_ROW + 1) >= steps else steps
        known = sensitivities(bench)

        def applied(threshold: float) -> Applied:
            return sencache(threshold, known, longest)

        return adaptive(name, wanted, bench, applied)


SENSITIVE: dict[str, Peer] = {"sencache": SenCachePeer()}
