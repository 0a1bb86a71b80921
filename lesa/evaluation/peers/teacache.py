"""TeaCache: full steps where the modulated input of the first block has changed enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lesa.evaluation.method import Bench
from lesa.evaluation.peers.controller import StepCache, controlled
from lesa.evaluation.peers.layouts import first_block
from lesa.evaluation.peers.per_run_cache import once_per_bench
from lesa.evaluation.peers.thresholds import Applied, mean_full_steps
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.outputs import read_sample
from lesa.hooks.pipeline import find_denoiser
from lesa.hooks.step_clock import Step
from lesa.hooks.wrappers import core_of

# Powers 0 to 4, fitted by the authors to FLUX.1-dev
FLUX = (0.264230861, -3.82021401, 55.8554382, -283.781631, 498.651651)
DEGREE = 4
Changes = list[tuple[float, float]]


@dataclass
class _State:
    modulated: Tensor | None = None
    residual: Tensor | None = None
    forecast: Tensor = field(default_factory=Tensor)
    output: Tensor | None = None
    distance: float = 0.0


class TeaCache(StepCache[_State]):
    """Full where P(rho) has summed up to the threshold; else h_hat_s = x_s + (h_p - x_p).

    rho is the relative L1 change of the first block's modulated input from step to step, P a
    polynomial that turns it into the change of the output. x are the embedded tokens. The first and
    the last step are full. Every step runs the model without its blocks, with the forecast in front
    of the tail: that tells rho, and is already the output where the step is skipped.
    Source: TeaCache (arXiv 2411.19108).

    polynomial: coefficients by power. changes: where given, every step is full and its pair (rho,
    relative L1 change of the output) is added.
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float,
        polynomial: Sequence[float],
        changes: Changes | None = None,
    ) -> None:
        super().__init__(model)
        self._threshold, self._polynomial, self._changes = threshold, polynomial, changes
        self._first = first_block(self.core, self.spec)

    def begin(self) -> _State:
        return _State()

    def step(
        self, denoiser: Denoiser, step: Step, state: _State, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        skipped, tokens, time = self.without_blocks(
            denoiser, args, kwargs, state.forecast, state.residual
        )
        modulated = self.layout.modulated(self._first, tokens, time)
        change = None if state.modulated is None else relative_change(modulated, state.modulated)
        state.modulated = modulated
        if not self._is_full(step, state, change):
            return skipped
        state.distance = 0.0
        output, feature = self.full(denoiser, args, kwargs)
        state.residual, state.forecast = feature - tokens, feature
        if self._changes is not None:
            self._note(state, change, output)
        return output

    def _is_full(self, step: Step, state: _State, change: float | None) -> bool:
        if change is None or self._changes is not None or step.index == step.num_steps - 1:
            return True
        state.distance += sum(c * change**i for i, c in enumerate(self._polynomial))
        return state.distance >= self._threshold

    def _note(self, state: _State, change: float | None, output: Any) -> None:
        sample = read_sample(output)
        assert sample is not None and self._changes is not None
        if change is not None and state.output is not None:
            self._changes.append((change, relative_change(sample, state.output)))
        state.output = sample


def relative_change(new: Tensor, old: Tensor) -> float:
    """mean |new - old| / mean |old|."""
    return float((new - old).abs().mean() / old.abs().mean())


def fit_polynomial(changes: Changes) -> tuple[float, ...]:
    """Least squares of the second of each pair on the powers 0 to 4 of the first."""
    given, wanted = torch.tensor(changes, dtype=torch.float64).unbind(1)
    powers = given[:, None] ** torch.arange(DEGREE + 1)
    return tuple(
        torch.linalg.lstsq(powers, wanted[:, None], driver="gelsd").solution[:, 0].tolist()
    )


@once_per_bench
def polynomial_for(bench: Bench) -> tuple[float, ...]:
    """The published polynomial for FLUX.1-dev; of another model one that is fitted to plain runs
    of a few calibration prompts, as its authors do."""
    if _is_flux_dev(core_of(find_denoiser(bench.pipe))):
        return FLUX
    changes: Changes = []
    mean_full_steps(bench, teacache(0.0, (), changes))
    return fit_polynomial(changes)


def teacache(
    threshold: float, polynomial: Sequence[float], changes: Changes | None = None
) -> Applied:
    """Pipeline -> the context manager that puts TeaCache on it; see `TeaCache`."""
    return lambda pipe: controlled(
        pipe, lambda model: TeaCache(model, threshold, polynomial, changes)
    )


def _is_flux_dev(core: Any) -> bool:
    config = core.config
    size = (config.get("num_layers"), config.get("num_single_layers"))
    return (
        type(core).__name__ == "FluxTransformer2DModel"
        and size == (19, 38)
        and bool(config.guidance_embeds)
    )
