"""What the user asked for, validated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, cast

from lesa.core.checks import MOST_STEPS, reals, shown, whole
from lesa.core.forecaster import Forecaster, Tap
from lesa.core.schedule import Schedule, spread
from lesa.errors import LesaError, RunError
from lesa.forecasters.named import named
from lesa.forecasters.published import rule_of
from lesa.forecasters.taylor import Taylor
from lesa.hooks.noise_levels import own_noise_levels

__all__ = ["DEFAULT_TAP", "LesaConfig"]

DEFAULT_TAP: Tap = "output"
_DEFAULT_INTERVAL = 5


@dataclass(frozen=True)
class LesaConfig:
    """How a denoiser is accelerated.

    Args:
        forecaster: makes the coefficients; first-order Taylor if not given. Also by name: the
            folder or Hub id of a trained one, or a training-free method ("taylor-1", "fora", ...).
        full_steps: how many steps are computed in full. Exclusive with `schedule`. A forecaster
            that its authors publish with a rule follows it, at the setting with the fewest full
            steps that are not below. A trained one that does not know the count adds steps to the
            next smaller list that it knows, or spreads the nearest one anew where that would grow
            by more than half, and `enable` warns. With neither, the count of a trained forecaster's
            first calibrated schedule, or its share of the steps in a run too short to skip any;
            else `Schedule.every(5)`.
        schedule: which steps are computed in full, bound to a step count or not.
        tap: the cached feature, "output" or "hidden"; the forecaster's own if None.
        graph: "auto" or "off": whether a skipped step of the hidden tap is captured as a CUDA
            graph where the model and the device allow it (see `lesa.engine.graphs.tail_graph`).
        num_inference_steps: steps of a custom loop around a bare model.
        sigmas: its `num_inference_steps + 1` noise levels in [0, 1].
        scheduler: the diffusers scheduler of a custom loop, instead of the two above.

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
        if isinstance(self.forecaster, (str, PathLike)):
            object.__setattr__(self, "forecaster", named(self.forecaster))
        if isinstance(self.forecaster, type) or not isinstance(self.forecaster, Forecaster):
            raise LesaError(
                f"forecaster is {_kind(self.forecaster)}: give lesa.Taylor(), a folder, the name "
                "of a method, or another Forecaster."
            )
        self._check_steps()
        self._check_tap()
        if not isinstance(self.graph, str) or self.graph not in ("auto", "off"):
            raise LesaError(f"graph is {shown(self.graph)}: give 'auto' or 'off'.")
        self._check_loop()
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
            count = _default_count(calibrated[0], num_steps)
            return forecaster.schedule_for(count, num_steps, sigmas)
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
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise LesaError(
                f"schedule is {shown(self.schedule)}: give a Schedule, as "
                "Schedule.explicit([0, 1, 5])."
            )
        if self.schedule is not None and self.full_steps is not None:
            raise LesaError(
                f"full_steps={shown(self.full_steps)} and schedule={self.schedule} exclude each "
                "other: give one of them."
            )
        if self.full_steps is None:
            return
        try:
            object.__setattr__(
                self, "full_steps", whole("full_steps", self.full_steps, 1, MOST_STEPS)
            )
        except LesaError:
            raise LesaError(
                f"full_steps is {shown(self.full_steps)}, it is a count: give a whole number of at "
                "least 1, or a list of steps as schedule=Schedule.explicit(steps)."
            ) from None

    def _check_loop(self) -> None:
        """The steps and the noise levels of a custom loop, as far as they are given."""
        steps = self.num_inference_steps
        if steps is not None:
            steps = whole("num_inference_steps", steps, 1, MOST_STEPS)
            object.__setattr__(self, "num_inference_steps", steps)
        if self.sigmas is not None:
            levels = reals("sigmas", self.sigmas, "give noise levels in [0, 1]")
            object.__setattr__(self, "sigmas", own_noise_levels(steps, levels))
        if self.scheduler is not None and not hasattr(self.scheduler, "timesteps"):
            raise LesaError(
                f"scheduler is {_kind(self.scheduler)}: give the diffusers scheduler of the loop."
            )

    def _check_tap(self) -> None:
        if self.tap is not None and (
            not isinstance(self.tap, str) or self.tap not in ("hidden", "output")
        ):
            raise LesaError(f"tap is {shown(self.tap)}: give 'output' or 'hidden'.")
        own = self.forecaster.tap
        if self.tap is not None and own not in (None, self.tap):
            raise LesaError(
                f"tap is {self.tap!r}, the forecaster {self.forecaster.name} was made for {own!r}: "
                "leave tap out, or train one for this tap."
            )
        if self.resolved_tap == "hidden" and self.forecaster.uses_latent:
            raise LesaError(
                f"tap is 'hidden', where no latent is cached, but the forecaster "
                f"{self.forecaster.name} needs it: use 'output', or one made without the latent."
            )


def _default_count(calibrated: Schedule, num_steps: int) -> int:
    """As many full steps as were calibrated, or the same share of a run that is not longer."""
    count = len(calibrated.full_steps)
    return count if count < num_steps else max(1, round(count * num_steps / calibrated.steps))


def _schedule_of(count: int, num_steps: int) -> Schedule:
    """The paper's rule with `count` full steps, else steps as evenly spaced as possible."""
    for interval in range(1, num_steps + 1):
        schedule = Schedule.every(interval, num_steps)
        if len(schedule.full_steps) == count:
            return schedule
    places = [i * num_steps / count for i in range(count)]
    return Schedule.explicit(spread(places, num_steps), num_steps)


def _kind(value: Any) -> str:
    """What a value is, where it should have been something else."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
