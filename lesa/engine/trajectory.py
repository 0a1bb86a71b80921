"""One generation in one guidance branch: what it keeps, what it forecasts, and when."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from lesa.core.forecaster import Tap
from lesa.engine.conditioning import Conditioning
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.graphs.tail_graph import TailBuffers
from lesa.engine.pool import Lease, Pool
from lesa.engine.ring import Ring
from lesa.engine.step_table import Guarded, StepTable
from lesa.errors import LesaError
from lesa.forecasters.guard import relative_change
from lesa.hooks.denoiser import Call, Run
from lesa.hooks.outputs import (
    as_batch,
    without_variance,
)
from lesa.hooks.step_clock import Step

__all__ = [
    "FeatureTap",
    "Forecast",
    "Memory",
    "Refusal",
    "Trajectory",
]

# Memory [K, *shape] for a ring of K features like the given one; a Refusal where there is none.
Memory = Callable[[int, Tensor], Tensor]


_NO_ROOM = "memory_limit: the rings of other requests leave no room for this one"
_TAKEN = "memory_limit: another request got the ring of this one, which had stopped"


class Refusal(LesaError):
    """Why one call cannot be forecast; the engine computes it in full."""


class Forecast(Protocol):
    """What the skipped steps of one trajectory compute; the only owner of its ring.

    `forecast(call, index)` is the model's output at the table's step `index`, whose feature enters
    the ring where the table says so; it raises Refusal where there is no such output.
    """

    ring: Ring

    def __call__(self, call: Call, index: int, /) -> Any: ...


class FeatureTap(Protocol):
    """A tap at work: which feature of a full step is cached, and how a forecast becomes an output.

    Attributes:
        name: "output" or "hidden".
        inside: whether the feature lies inside of the model, which is then told to note it.
        graphs: CUDA graphs of its skipped steps, if it has any.
    """

    name: Tap
    inside: bool
    graphs: StepGraphs[TailBuffers] | None

    def take(self, call: Call, run: Run) -> Tensor | None:
        """The feature of a full step; None where the model gave no single tensor."""

    def forecast(
        self, call: Call, run: Run, feature: Tensor, table: StepTable, memory: Memory
    ) -> Forecast:
        """The forecasts of a trajectory, with an empty ring in `memory`, from its first feature
        on."""


class Trajectory:
    """The steps from `origin` on, of one generation in one branch.

    Keeps K features in a ring and weak references to the conditioning; nothing else. The ring goes
    with the last skipped step, or with the tensors that only the caller's loop holds: a run that
    broke off leaves none behind, once its traceback is gone.

    Args:
        table: the coefficients of its steps.
        call: its first call.
        tap: which feature it caches.
        pool: where the memory of its ring comes from, and goes back to.
        remade: see `Conditioning`.
    """

    def __init__(
        self,
        table: StepTable,
        call: Call,
        tap: FeatureTap,
        pool: Pool,
        remade: set[str] | None = None,
    ) -> None:
        self.origin = call.step.index
        self._table, self._tap = table, tap
        self._extra: frozenset[int] = frozenset()
        self._change: Tensor | None = None
        self._forecast: Forecast | None = None
        num_steps = self.origin + len(table.rows)
        places = set() if remade is None else remade
        lose = _releaser(self)
        self._lease = Lease(pool, lose)
        self._conditioning = Conditioning(call, num_steps, places, lose)

    @property
    def ring(self) -> Ring | None:
        """The cached features, from the first one on until they are released."""
        forecast = self._forecast
        return None if forecast is None else forecast.ring

    def skips(self, step: Step) -> bool:
        """Whether the table forecasts this step."""
        index = step.index - self.origin
        return self._table.rows[index] is not None and index not in self._extra

    def enters(self, step: Step) -> bool:
        """Whether a later step needs the feature of this one."""
        return self._table.pushes[step.index - self.origin]

    def disturbance(self, call: Call) -> str | None:
        """Why the cached features do not fit this call, if so."""
        return self._conditioning.change(call)

    def fits(self, latent: Tensor) -> bool:
        """Whether a latent is laid out as the one that it began with."""
        return self._conditioning.fits(latent)

    def release(self, *, again: bool = False) -> None:
        """Let go of the features and of all that a forecast needs; `again` as in `Lease.end`."""
        self._forecast = None
        self._lease.end(again=again)

    def forecast(self, call: Call) -> Any:
        """The output of a skipped step.

        Raises:
            Refusal: there is none.
        """
        self._lease.touch()
        forecast, index = self._forecast, call.step.index - self.origin
        if forecast is None or forecast.ring.pushed != self._table.expected[index]:
            raise Refusal(_TAKEN if self._lease.lost else "missing history")
        output = forecast(call, index)
        if index == self._table.last:  # before a VAE decodes, when memory is scarcest
            del forecast
            self.release(again=True)
        return output

    def keep(self, call: Call, run: Run) -> Tensor | None:
        """Take the feature of a full step into the ring if a later step needs it.

        Returns:
            The feature that has entered the ring, if any.

        Raises:
            Refusal: the model gave no such feature, or one that does not fit the ring.
        """
        self._lease.touch()
        feature, forecast = self._tap.take(call, run), self._forecast
        if not self.enters(call.step):
            if call.step.index - self.origin == self._table.last:  # computed in full after all
                self.release(again=True)
            return None
        if feature is None:
            raise Refusal(f"no single tensor at the {self._tap.name} tap")
        if forecast is None:
            forecast = self._forecast = self._tap.forecast(
                call, run, feature, self._table, self._memory
            )
        elif not forecast.ring.matches(feature):
            raise Refusal("feature changed in shape, dtype or device")
        if self._looks(call.step) and forecast.ring.pushed:  # a ring of one holds no two features
            self._change = self._change_of(call, feature, forecast.ring)
        forecast.ring.push(feature)
        return feature

    @property
    def guarded(self) -> Guarded | None:
        """What becomes of the rest of it if a picture is at risk, as long as that is open."""
        return self._table.guarded

    @property
    def risk(self) -> float | None:
        """The largest relative change of a row from the full step before to the one at which a
        guard looks, without a learned variance; None where it has not been there. Waits for the
        device."""
        return None if self._change is None else float(self._change.max())

    def _looks(self, step: Step) -> bool:
        """Whether this is the step at which a guard looks."""
        guarded = self._table.guarded
        return guarded is not None and step.index == guarded.guard.step

    def _change_of(self, call: Call, feature: Tensor, ring: Ring) -> Tensor:
        """The relative change of every row from the newest feature of the ring to this one."""
        now, before = feature.detach(), ring.features[ring.order[0]]
        if not self._tap.inside:  # where a feature of twice the latent's channels is no variance
            latent = as_batch(call.argument(call.denoiser.spec.latent))
            now, before = (without_variance(part, latent) for part in (now, before))
        return relative_change(now, before)

    def act(self, call: Call, run: Run) -> None:
        """Go on, after this full step, as a picture at risk does.

        Raises:
            Refusal: there is no memory for it.
        """
        guarded, forecast = self._table.guarded, self._forecast
        assert guarded is not None and forecast is not None  # its risk was read
        if guarded.other is None:
            self._extra = frozenset(guarded.extra)
            return
        self._table, old = guarded.other, forecast.ring
        kept = [old.features[slot].clone() for slot in reversed(old.order[: old.count])]
        pushed, self._forecast = old.pushed, None
        del forecast, old  # a graph has a ring of its own
        self._lease.end()
        forecast = self._tap.forecast(call, run, kept[-1], self._table, self._memory)
        for feature in kept:
            forecast.ring.push(feature)
        forecast.ring.pushed = pushed
        self._forecast = forecast

    def _memory(self, history: int, like: Tensor) -> Tensor:
        """See `Memory`."""
        data = self._lease.take(history, like)
        if data is None:
            raise Refusal(_NO_ROOM)
        return data


def _releaser(trajectory: Trajectory) -> Callable[..., None]:
    """For weak references and the pool: releases the trajectory, which it does not keep alive."""
    own = weakref.ref(trajectory)

    def release(_: Any = None) -> None:
        found = own()
        if found is not None:
            found.release()

    return release
