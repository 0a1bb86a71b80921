"""What the user asked for, validated once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, cast, get_args

from lesa.core.checks import MOST_STEPS, reals, shown, whole
from lesa.core.forecaster import Forecaster, Tap
from lesa.core.schedule import Schedule
from lesa.engine.full_steps import Choice, by_count, by_default, by_target
from lesa.errors import LesaError, RunError
from lesa.forecasters.guard import Guard, Mode, check_mode
from lesa.forecasters.named import named
from lesa.forecasters.prior import Prior
from lesa.forecasters.target import Quality, Target
from lesa.hooks.noise_levels import own_noise_levels

__all__ = ["DEFAULT_TAP", "LesaConfig"]

DEFAULT_TAP: Tap = "output"


@dataclass(frozen=True)
class LesaConfig:
    """How a denoiser is accelerated.

    Args:
        forecaster: makes the coefficients; `lesa.Prior`, which needs no training, if not given.
            Also by name: the folder or Hub id of a trained one, or a training-free method
            ("taylor-1", "fora", ...).
        full_steps: how many steps are computed in full, instead of `schedule` or a target. A
            forecaster that its authors publish with a rule follows it, at the setting with the
            fewest full steps that are not below. A trained one that does not know the count adds
            steps to the next smaller list that it knows, or spreads the nearest one anew where that
            would grow by more than half, and `enable` warns. With none of these, the count of a
            trained forecaster's first calibrated schedule, or its share of the steps in a run too
            short to skip any; of the prior a fifth of the steps, or 10 if that is more, but at
            most two fifths; else `Schedule.every(5)`.
        schedule: which steps are computed in full, bound to a step count or not.
        tap: the cached feature, "output" or "hidden"; the forecaster's own if None.
        graph: "auto" or "off": whether a skipped step of the hidden tap is captured as a CUDA
            graph where the model and the device allow it (see `lesa.engine.graphs.tail_graph`).
        num_inference_steps: steps of a custom loop around a bare model.
        sigmas: its `num_inference_steps + 1` noise levels in [0, 1].
        scheduler: the diffusers scheduler of a custom loop, instead of the two above.
        target_speedup, target_psnr, quality: instead of a count, what it shall reach; see
            `lesa.forecasters.target.Target`. The count is chosen when a generation begins.
        guard: what a picture at risk gets: "off" for nothing, "route" for another list of as many
            full steps, "spend" for further ones; by default what training found to pay, if
            anything. See `lesa.forecasters.guard.Guard`.
        memory_limit: bytes that the cached features of all requests may take together; steps of a
            request that finds no room are computed in full. No limit if None. CUDA graphs, which
            have features in buffers of their own, are not counted.

    Raises:
        LesaError: a field is invalid or two contradict each other.
    """

    forecaster: Forecaster = field(default_factory=Prior)
    full_steps: int | None = None
    schedule: Schedule | None = None
    tap: Tap | None = None
    graph: Literal["auto", "off"] = "auto"
    num_inference_steps: int | None = None
    sigmas: Sequence[float] | None = None
    scheduler: Any = None
    target_speedup: float | None = None
    target_psnr: float | None = None
    quality: Quality | None = None
    guard: Mode | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.forecaster, (str, PathLike)):
            object.__setattr__(self, "forecaster", named(self.forecaster))
        if isinstance(self.forecaster, type) or not isinstance(self.forecaster, Forecaster):
            raise LesaError(
                f"forecaster={shown(self.forecaster)}: {_kind(self.forecaster)}, not a forecaster"
                f"{_lacks(self.forecaster)}; give lesa.Prior(), a folder, the name of a method, or "
                "another lesa.Forecaster"
            )
        self._check_steps()
        self._check_tap()
        if not isinstance(self.graph, str) or self.graph not in ("auto", "off"):
            raise LesaError(f"graph={shown(self.graph)}: unknown; give 'auto' or 'off'")
        self._check_loop()
        self._check_guard()
        if self.memory_limit is not None:
            limit = whole("memory_limit", self.memory_limit, 1)
            object.__setattr__(self, "memory_limit", limit)
        if self.num_inference_steps is not None:
            self.bound_schedule(self.num_inference_steps, self.sigmas)

    @property
    def target(self) -> Target | None:
        """What was asked for instead of a count."""
        given = self.target_speedup, self.target_psnr, self.quality
        return None if all(value is None for value in given) else Target(*given)

    @property
    def resolved_tap(self) -> Tap:
        """The tap asked for, else the forecaster's own, else the default."""
        return self.tap or self.forecaster.tap or DEFAULT_TAP

    def bound_schedule(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Schedule:
        """The schedule of a run of `num_steps` steps; LesaError where there is none."""
        return self.choice(num_steps, sigmas).schedule

    def choice(self, num_steps: int, sigmas: Sequence[float] | None = None) -> Choice:
        """The schedule of such a run, and for which target it was chosen; LesaError without one."""
        if self.schedule is not None:
            return Choice(self.schedule.bind(num_steps))
        if self.full_steps is not None:
            return by_count(self.forecaster, self.full_steps, num_steps, sigmas)
        if self.target is not None:
            return by_target(self.forecaster, self.target, num_steps, sigmas)
        return by_default(self.forecaster, num_steps, sigmas)

    def guard_of(self, schedule: Schedule, sigmas: Sequence[float]) -> Guard | None:
        """What guards a run that follows a schedule at these noise levels, if anything does."""
        known = [] if self.guard == "off" else getattr(self.forecaster, "calibrations", [])
        entry = next((c for c in known if c.guard and c.matches(schedule, sigmas)), None)
        if entry is None or self.guard not in (None, entry.guard.kind):
            return None
        return cast(Guard, entry.guard)

    def check_run(
        self,
        num_steps: int,
        branch: str | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """RunError where a run of `num_steps` steps, or its guidance, contradicts these options.

        No `branch` leaves the guidance out. Calls without a name of their own ("default#1") are
        taken as they come.
        """
        try:
            if self.schedule is not None and self.schedule.rule == "explicit":
                Schedule("explicit", self.schedule.value, num_steps)
            if self.target is not None:
                self.choice(num_steps, sigmas)
            if branch and "#" not in branch and hasattr(self.forecaster, "branch"):
                self.forecaster.branch(branch)
        except LesaError as error:
            raise RunError(str(error)) from None

    def _check_steps(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise LesaError(
                f"schedule={shown(self.schedule)}: not a Schedule; give one, as "
                "Schedule.explicit([0, 1, 5])"
            )
        names = ("full_steps", "schedule", "target_speedup", "target_psnr", "quality")
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        if len(asked) > 1:
            one, other, *_ = [
                f"{name}={value if name == 'schedule' else shown(value)}"
                for name, value in asked.items()
            ]
            raise LesaError(f"{one} and {other} exclude each other; give one of them")
        if self.target is not None:
            self.target.check(self.forecaster)
        if self.full_steps is None:
            return
        try:
            object.__setattr__(
                self, "full_steps", whole("full_steps", self.full_steps, 1, MOST_STEPS)
            )
        except LesaError:
            raise LesaError(
                f"full_steps={shown(self.full_steps)}: not a count; give a whole number >= 1, "
                "or a list of steps as schedule=Schedule.explicit(steps)"
            ) from None

    def _check_guard(self) -> None:
        check_mode(self.guard)
        known = [c.guard.kind for c in getattr(self.forecaster, "calibrations", []) if c.guard]
        if self.guard in (None, "off", *known):
            return
        has = f"has guard={known[0]!r}" if known else "has none"
        raise LesaError(
            f"guard={self.guard!r}: the forecaster {self.forecaster.name} {has}; leave guard out, "
            f"or train with guard={self.guard!r}"
        )

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
                f"scheduler={shown(self.scheduler)}: {_kind(self.scheduler)}, not a scheduler; "
                "give the diffusers scheduler of the loop"
            )

    def _check_tap(self) -> None:
        known = isinstance(self.tap, str) and self.tap in get_args(Tap)
        if self.tap is not None and not known:
            raise LesaError(f"tap={shown(self.tap)}: unknown; give 'output' or 'hidden'")
        own = self.forecaster.tap
        if self.tap is not None and own not in (None, self.tap):
            raise LesaError(
                f"tap={self.tap!r}: the forecaster {self.forecaster.name} was made for {own!r}; "
                "leave tap out, or train one for this tap"
            )
        if self.resolved_tap == "hidden" and self.forecaster.uses_latent:
            raise LesaError(
                "tap='hidden': no latent is cached there, but the forecaster "
                f"{self.forecaster.name} needs it; use 'output', or one made without the latent"
            )


def _lacks(value: Any) -> str:
    """What a forecaster has that this value has not, where it is one but for that."""
    names = ("name", "uses_latent", "tap", "history", "table")
    missing = [name for name in names if not hasattr(value, name)]
    told = f", it has no {' and no '.join(missing)}"
    return told if 0 < len(missing) < len(names) and not isinstance(value, type) else ""


def _kind(value: Any) -> str:
    """What a value is, where it should have been something else."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
