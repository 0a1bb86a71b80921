"""What the peers share that keep what all blocks together add to the embedded tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.evaluation.peers.controller import StepCache, controlled
from lesa.evaluation.peers.layouts import bound_arguments, first_block
from lesa.evaluation.peers.thresholds import Applied
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.step_clock import Step

__all__ = ["Residual", "ResidualCache", "ResidualReuse", "residual_reuse"]


@dataclass
class Residual:
    """Of one guidance branch: r = what the blocks added at the last full step, and room for a
    forecast, both [B, L, C]."""

    residual: Tensor | None = None
    forecast: Tensor = field(default_factory=Tensor)


R = TypeVar("R", bound=Residual)


class ResidualCache(StepCache[R]):
    """Controller that runs the whole model and keeps r, or no block and puts x + r before the
    tail; x are the embedded tokens of the step."""

    def compute(
        self, denoiser: Denoiser, state: R, args: tuple[Any, ...], kwargs: Any
    ) -> tuple[Any, Tensor]:
        """The whole model's output, and the embedded tokens."""
        seen: list[Tensor] = []

        def note(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(bound_arguments(block.forward, given, named)["hidden_states"])

        first = first_block(self.core, self.spec)
        with first.register_forward_pre_hook(note, with_kwargs=True):
            output, feature = self.full(denoiser, args, kwargs)
        state.residual, state.forecast = feature - seen[0], feature
        return output, seen[0]

    def reuse(
        self,
        denoiser: Denoiser,
        state: R,
        args: tuple[Any, ...],
        kwargs: Any,
        residual: Callable[[Tensor], Tensor] | None = None,
    ) -> Any:
        """The output for x + r, or for x + residual(x)."""
        given = state.residual if residual is None else residual
        return self.without_blocks(denoiser, args, kwargs, state.forecast, given)[0]


class ResidualReuse(ResidualCache[Residual]):
    """h_hat_s = x_s + r_p on a given list of full steps."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__(model)
        self._schedule = schedule

    def begin(self) -> Residual:
        return Residual()

    def step(
        self, denoiser: Denoiser, step: Step, state: Residual, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if self._schedule.is_full(step.index):
            return self.compute(denoiser, state, args, kwargs)[0]
        return self.reuse(denoiser, state, args, kwargs)


def residual_reuse(schedule: Schedule) -> Applied:
    """Pipeline -> the context manager that puts reuse of the residual on it."""
    return lambda pipe: controlled(pipe, lambda model: ResidualReuse(model, schedule))
