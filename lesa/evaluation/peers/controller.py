"""What the peers over lesa's hooks share: states per guidance branch, a count of full steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lesa.errors import RunError
from lesa.evaluation.method import Use
from lesa.evaluation.peers.layouts import Layout, known_layout
from lesa.evaluation.peers.metering import held_bytes
from lesa.hooks import attach
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.model_specs import ModelSpec, model_spec
from lesa.hooks.pipeline import find_denoiser
from lesa.hooks.step_clock import Step
from lesa.hooks.wrappers import core_of

S = TypeVar("S")


class StepCache(ABC, Generic[S]):
    """Controller that runs each call in full or skips it; a generation begins with new states.

    Attributes:
        core, spec, layout: the denoiser and what is known of its class.
        full_calls: how many calls ran the whole model.
        cache_bytes: the most bytes that the states of a generation held.
    """

    def __init__(self, model: nn.Module) -> None:
        self.core: Any = core_of(model)
        self.spec: ModelSpec = model_spec(self.core)
        self.layout: Layout = known_layout(model)
        self.full_calls = self.cache_bytes = 0
        self._states: dict[str, S] = {}
        self._branches: set[str] = set()

    @abstractmethod
    def begin(self) -> S:
        """The state of a guidance branch before its first call."""

    @abstractmethod
    def step(
        self, denoiser: Denoiser, step: Step, state: S, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """The model's output at one step of one branch."""

    def __call__(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = denoiser.clock.tick(kwargs)
        if step.problem is not None:
            raise RunError(f"step {step.index} cannot be followed ({step.problem}); leave it out")
        if step.fresh:
            self._states.clear()
        self._branches.add(step.branch)
        state = self._states.setdefault(step.branch, self.begin())
        output = self.step(denoiser, step, state, args, kwargs)
        held = held_bytes([vars(state) for state in self._states.values()])
        self.cache_bytes = max(self.cache_bytes, held)
        return output

    @property
    def full_steps(self) -> float:
        """Full calls per guidance branch."""
        return self.full_calls / max(1, len(self._branches))

    def full(self, denoiser: Denoiser, args: tuple[Any, ...], kwargs: Any) -> tuple[Any, Tensor]:
        """Run the whole model: its output, and a copy of the feature in front of the tail."""
        self.full_calls += 1
        run = denoiser.run(args, kwargs, tap=True)
        assert run.feature is not None  # every layout has a tail
        return run.output, run.feature.clone()

    def without_blocks(
        self,
        denoiser: Denoiser,
        args: tuple[Any, ...],
        kwargs: Any,
        forecast: Tensor,
        residual: Tensor | Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Any, Tensor, Tensor]:
        """Run the model without its blocks: output, tokens [B, L, C] and time embedding [B, C].

        In front of the tail comes `forecast`, into which tokens + `residual` (a tensor, or what it
        makes of the tokens) is written first where that is given.
        """
        seen: list[Tensor] = []

        def listen(module: nn.Module, given: tuple[Any, ...]) -> None:
            seen.extend(given[:2])
            if residual is not None:
                added = residual if isinstance(residual, Tensor) else residual(given[0])
                torch.add(given[0], added, out=forecast)

        tail = self.spec.module(self.core, self.spec.tail)
        with tail.register_forward_pre_hook(listen, prepend=True):
            output = denoiser.run_tail(forecast, args, kwargs).output
        tokens, time = seen
        return output, tokens, time


@contextmanager
def controlled(pipe: Any, make: Callable[[nn.Module], StepCache[Any]]) -> Iterator[Use]:
    """A controller on a pipeline's denoiser for a while; the model is as before afterwards."""
    model = find_denoiser(pipe)
    controller = make(model)
    with attach.controlled([model], controller, pipe):
        yield Use(lambda: controller.cache_bytes, lambda: controller.full_steps)
