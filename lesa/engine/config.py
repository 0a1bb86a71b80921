"""What the user asked for, validated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from lesa.core.forecaster import Forecaster, Tap
from lesa.core.schedule import Schedule, spread
from lesa.errors import LesaError, RunError
from lesa.forecasters.published import rule_of
from lesa.forecasters.taylor import Taylor

__all__ = ["DEFAULT_TAP", "LesaConfig"]

DEFAULT_TAP: Tap = "output"
_DEFAULT_INTERVAL = 5


@dataclass(frozen=True)
class LesaConfig:
    """How a denoiser is accelerated.

    Args:
        forecaster: makes the coefficients; first-order Taylor if not given.
        full_steps: how many steps are computed in full. Exclusive with `schedule`. A forecaster
            that its authors publish with a rule follows it, at the setting with the fewest full
            steps that are not below. With neither, a trained forecaster's first calibrated
            schedule, else `Schedule.every(5)`.
        schedule: which steps are computed in full, bound to a step count or not.
        tap: the cached feature, "output" or "hidden"; the forecaster's own if None.
        graph: "auto" or "off": whether a skipped step of the hidden tap is captured as a CUDA
            graph where the model and the device allow it (see `lesa.engine.graphs.tail_graph`).
        num_inference_steps: steps of one's own loop around a bare model.
        sigmas: its `num_inference_steps + 1` noise levels in [0, 1].
        scheduler: the diffusers scheduler of one's own loop, instead of the two above.

    Raises:
        LesaError: a field is invalid or two contradict each other.
    """

    forecaster: Forecaster = field(default_factory=Taylor)
    full_steps: int | None = None
    schedule: Schedule | None = None
    tap: Tap | None = None
    graph: Literal["auto", "off"] = "auto"
    num_inference_steps: int | None = None
    sigmas: Sequence[float] | None = None
    scheduler: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.forecaster, Forecaster):
            raise LesaError(
                f"forecaster is a {type(self.forecaster).__name__}: give lesa.Taylor(), "
                "LesaForecaster.from_pretrained(folder) or another Forecaster."
            )
        self._check_steps()
        self._check_tap()
        if self.graph not in ("auto", "off"):
            raise LesaError(f"graph is {self.graph!r}: give 'auto' or 'off'.")
        if self.num_inference_steps is not None:
            self.bound_schedule(self.num_inference_steps, self.sigmas)

    @property
    def resolved_tap(self) -> Tap:
        """The tap asked for, else the forecaster's own, else the default."""
        return self.tap or self.forecaster.tap or DEFAULT_TAP

    def bound_schedule(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Schedule:
        """The schedule of a run of `num_steps` steps; LesaError where there is none."""
        if self.schedule is not None:
            return self.schedule.bind(num_steps)
        forecaster = cast(Any, self.forecaster)
        calibrated = getattr(forecaster, "calibrated", [])
        if self.full_steps is not None:
            if self.full_steps > num_steps:
                raise LesaError(
                    f"full_steps is {self.full_steps} for a run of {num_steps} steps: "
                    f"give at most {num_steps}."
                )
            if calibrated:
                return forecaster.schedule_for(self.full_steps, num_steps, sigmas)
            if (rule := rule_of(forecaster)) is not None:
                return rule.nearest(self.full_steps, num_steps)
            return _schedule_of(self.full_steps, num_steps)
        if calibrated:
            return forecaster.schedule_for(len(calibrated[0].full_steps), num_steps, sigmas)
        return Schedule.every(_DEFAULT_INTERVAL, num_steps)

    def check_run(self, num_steps: int, branch: str) -> None:
        """RunError where a run of `num_steps` steps, or its guidance, contradicts these options.

        Calls without a name of their own ("default#1") are taken as they come.
        """
        try:
            if self.schedule is not None and self.schedule.rule == "explicit":
                Schedule("explicit", self.schedule.value, num_steps)
            if hasattr(self.forecaster, "branch") and "#" not in branch:
                self.forecaster.branch(branch)
        except LesaError as error:
            raise RunError(str(error)) from None

    def _check_steps(self) -> None:
        if self.schedule is not None and self.full_steps is not None:
            raise LesaError(
                f"full_steps={self.full_steps} and schedule={self.schedule} exclude each other: "
                "give one of them."
            )
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise LesaError(
                f"schedule is {self.schedule!r}: give a Schedule, as Schedule.explicit([0, 1, 5])."
            )
        count = self.full_steps
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise LesaError(
                f"full_steps is {count!r}, it is a count: give an int, or a list of steps as "
                "schedule=Schedule.explicit(steps)."
            )
        if count is not None and count < 1:
            raise LesaError(f"full_steps is {count}: give at least 1.")

    def _check_tap(self) -> None:
        if self.tap not in (None, "hidden", "output"):
            raise LesaError(f"tap is {self.tap!r}: give 'output' or 'hidden'.")
        own = self.forecaster.tap
        if self.tap is not None and own not in (None, self.tap):
            raise LesaError(
                f"tap is {self.tap!r}, the forecaster {self.forecaster.name} was made for {own!r}: "
                "leave tap out, or train one for this tap."
            )
        if self.resolved_tap == "hidden" and self.forecaster.uses_latent:
            raise LesaError(
                f"tap is 'hidden', where the latent of the forecaster {self.forecaster.name} "
                "has no place: use tap='output', or one made without the latent."
            )


def _schedule_of(count: int, num_steps: int) -> Schedule:
    """The paper's rule with `count` full steps, else steps as evenly spaced as possible."""
    for interval in range(1, num_steps + 1):
        schedule = Schedule.every(interval, num_steps)
        if len(schedule.full_steps) == count:
            return schedule
    places = [i * num_steps / count for i in range(count)]
    return Schedule.explicit(spread(places, num_steps), num_steps)
