"""SpeCa: Taylor drafts, each verified by the last block, which may call for a full step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.evaluation.peers.controller import StepCache, controlled
from lesa.evaluation.peers.layouts import bound_arguments, last_block
from lesa.evaluation.peers.thresholds import Applied
from lesa.forecasters.taylor import Taylor
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.step_clock import Step

ORDER, LEADING = 2, 3
BASE, FLOOR, DECAY = 7.0, 0.1, 0.3  # published for FLUX.1-dev
Features = tuple[Tensor, Tensor, Tensor]  # into the last block: picture, text; out of it: picture


@dataclass
class _State:
    steps: list[int] = field(default_factory=list)
    features: list[Features] = field(default_factory=list)  # newest first
    arguments: dict[str, Any] = field(default_factory=dict)
    table: Table | None = None
    doubted: bool = False


class SpeCa(StepCache[_State]):
    """h_hat_s = Taylor series of order 2; e_s = mean(|h_hat - y| / (|y| + 1e-10)) judges it.

    y is what the last block makes of the Taylor series of its own inputs, at the current time. The
    step after is full where e_s > threshold * max(1/70, 0.3^(s / S)); the published threshold is 7.
    The first three steps are full.
    Source: SpeCa (arXiv 2509.11628).
    """

    def __init__(self, model: nn.Module, threshold: float) -> None:
        super().__init__(model)
        self._threshold = threshold
        self._last = last_block(self.core, self.spec)

    def begin(self) -> _State:
        return _State()

    def step(
        self, denoiser: Denoiser, step: Step, state: _State, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        if step.index < LEADING or state.doubted:
            return self._keep(denoiser, step, state, args, kwargs)
        assert state.table is not None
        weights = state.table.row(step.index).tolist()
        picture, text, forecast = (
            _mixed(weights, past) for past in zip(*state.features, strict=True)
        )
        output, _, time = self.without_blocks(denoiser, args, kwargs, forecast)
        given = {"hidden_states": picture, "encoder_hidden_states": text, "temb": time}
        verified = self._last(**{**state.arguments, **given})[self.layout.picture]
        state.doubted = mean_error(forecast, verified) > self.limit(step)
        return output

    def limit(self, step: Step) -> float:
        """The error above which the next step is full."""
        return self._threshold * max(FLOOR / BASE, DECAY ** (step.index / step.num_steps))

    def _keep(
        self, denoiser: Denoiser, step: Step, state: _State, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Run the whole model; its last block's inputs and output enter the history."""

        def note(block: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            state.arguments = bound_arguments(block.forward, given, named)

        with self._last.register_forward_pre_hook(note, with_kwargs=True):
            output, feature = self.full(denoiser, args, kwargs)
        picture, text = (
            state.arguments.pop(name).clone() for name in ("hidden_states", "encoder_hidden_states")
        )
        state.features = [(picture, text, feature), *state.features[:ORDER]]
        state.steps.append(step.index)
        state.table = Taylor(ORDER).table(Schedule.explicit(state.steps, step.num_steps))
        state.doubted = False
        return output


def mean_error(forecast: Tensor, verified: Tensor) -> float:
    """mean(|forecast - verified| / (|verified| + 1e-10)), element by element."""
    return float(((forecast - verified).abs() / (verified.abs() + 1e-10)).mean())


def speca(threshold: float) -> Applied:
    """Pipeline -> the context manager that puts SpeCa on it; see `SpeCa`."""
    return lambda pipe: controlled(pipe, lambda model: SpeCa(model, threshold))


def _mixed(weights: Sequence[float], past: Sequence[Tensor]) -> Tensor:
    """Weighted sum of the newest features."""
    pairs = zip(weights, past, strict=False)
    return torch.stack([weight * feature for weight, feature in pairs]).sum(0)
