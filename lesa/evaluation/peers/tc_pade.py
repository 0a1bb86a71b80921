"""TC-Pade: a rational forecast of what the blocks add, by phases of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Origin, Peer
from lesa.evaluation.peers.controller import controlled
from lesa.evaluation.peers.layouts import unfit_layout
from lesa.evaluation.peers.residual import Residual, ResidualCache
from lesa.evaluation.peers.thresholds import Applied
from lesa.forecasters.published import FullStepRule
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.step_clock import Step

__all__ = ["RATIONAL", "TCPade", "full_steps", "rational", "tc_pade"]

EARLY, LATE = 0.3, 0.8  # where the phases change, as shares of the run
LEAD, INTERVAL = 5, 8  # released
_TINY = 1e-7


@dataclass
class _State(Residual):
    past: list[Tensor] = field(default_factory=list)  # residuals, newest first
    tokens: Tensor = field(default_factory=Tensor)


class TCPade(ResidualCache[_State]):
    """h_hat_s = x_s + r_hat_s + 0.2 (x_s - x_{s-1}), with the residuals r1, r2 of the two steps
    before, forecasts included, and r_hat by phase:

        early (s <= 0.3 S)  0.9 r1 + 0.1 r2
        middle              R(r1, r2), see `rational`
        late (s > 0.8 S)    R(r1, r2) + 0.3 (r1 - r2)

    Each step's residual enters the history. The released code holds the phases of a run of 20
    steps fixed; here they are shares of the run, as in the paper. Its test of the curvature, which
    could call for further full steps, never does at the threshold released for FLUX.1-dev (1.4, the
    quantity is 1 at most), and is left out.
    Source: TC-Pade (arXiv 2603.02943), in the form of its released code.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__(model)
        self._schedule = schedule

    def begin(self) -> _State:
        return _State()

    def step(
        self, denoiser: Denoiser, step: Step, state: _State, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self._schedule.is_full(step.index):
            output, tokens = self.compute(denoiser, state, args, kwargs)
            assert state.residual is not None
            added = state.residual
        else:
            expected = forecast(state.past, step.index / step.num_steps)
            seen: list[Tensor] = []

            def residual(tokens: Tensor) -> Tensor:
                seen.extend([tokens, expected + 0.2 * (tokens - state.tokens)])
                return seen[-1]

            output = self.reuse(denoiser, state, args, kwargs, residual)
            tokens, added = seen
        state.past, state.tokens = [added, *state.past[:1]], tokens
        return output


def forecast(past: list[Tensor], share: float) -> Tensor:
    """r_hat at a share of the run; r1 where there is no r2."""
    if len(past) == 1:
        return past[0]
    newest, older = past
    if share <= EARLY:
        return 0.9 * newest + 0.1 * older
    made = rational(newest, older)
    return made + 0.3 * (newest - older) if share > LATE else made


def rational(newest: Tensor, older: Tensor) -> Tensor:
    """R(r1, r2), element by element:

    a = 0.6 r1 + 0.4 r2, d = |r1 - r2|, m = (|r1| + |r2|) / 2, g = exp(-5 d / m)
    p = (2 g r1 - g r2) / (1 - 0.1 g)
    R = a + (0.7 g + 0.3) clamp(p - a, +- max(d / 2, m / 10))
    """
    change, size = (newest - older).abs(), (newest.abs() + older.abs()) / 2
    trust = torch.exp(-5 * change / (size + _TINY))
    ratio = (2 * trust * newest - trust * older) / (1 - 0.1 * trust)
    recent, most = 0.6 * newest + 0.4 * older, torch.maximum(change / 2, size / 10)
    away = torch.minimum(torch.maximum(ratio - recent, -most), most)
    return recent + (0.7 * trust + 0.3) * away


def full_steps(interval: int, lead: int, num_steps: int) -> list[int]:
    """The first `lead` steps, every `interval`-th and the last one."""
    last = num_steps - 1
    return [s for s in range(num_steps) if s < lead or s % interval == 0 or s == last]


def tc_pade(schedule: Schedule) -> Applied:
    """Pipeline -> the context manager that puts TC-Pade on it; see `TCPade`."""
    return lambda pipe: controlled(pipe, lambda model: TCPade(model, schedule))


@dataclass(frozen=True)
class TCPadePeer:
    """TC-Pade on its rule: the first five steps, every N-th and the last one are full. Where five
    are more than half of the wanted number, only that half leads."""

    takes_lists = True

    def unfit(self, bench: Bench) -> str | None:
        """It looks into the blocks."""
        return unfit_layout(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The interval with the fewest full steps that are not below `wanted`, or a given list."""
        steps = bench.num_steps
        origin: Origin = "own" if searched is None else "searched"
        schedule = searched or nearest(wanted, steps)
        schedule = schedule.bind(steps)
        applied = tc_pade(schedule)
        return Method(name, steps, schedule=schedule, origin=origin, applied=applied)


def nearest(wanted: int, num_steps: int) -> Schedule:
    """The rule's list with the fewest full steps that are not below `wanted`; among several the
    released interval, then the smallest."""
    lead = min(LEAD, max(1, wanted // 2))
    if wanted == 1:
        return Schedule.explicit([0], num_steps)

    def listed(interval: int) -> Schedule:
        return Schedule.explicit(full_steps(interval, lead, num_steps), num_steps)

    return FullStepRule(listed, (INTERVAL,)).nearest(wanted, num_steps)


RATIONAL: dict[str, Peer] = {"tc-pade": TCPadePeer()}
