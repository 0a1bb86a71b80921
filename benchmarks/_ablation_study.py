"""The default training of one embedded pipeline and variants of it, as rollouts that can be run on
prompts that neither has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

from _richer import GroupedRollout
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.forecasters import LesaForecaster
from lesa.testbed import load, prompts, settings
from lesa.training import aims, arguments
from lesa.training.budget import Budget
from lesa.training.calibrate import Calibrator
from lesa.training.closed_loop import run_rollouts
from lesa.training.collect import collect
from lesa.training.fit import fit_continuous
from lesa.training.job import Job
from lesa.training.objective import quality
from lesa.training.rollout import Rollout, RolloutSpec
from lesa.training.search import OpenLoop
from lesa.training.statistics import Statistics

EDGES = ((0.95, 0.7), (0.9, 0.4), (0.8, 0.5), (0.7, 0.3), (0.6,))  # of stages, that compete
DEFAULT = "the default"
STEP_BY_STEP = "no fit of all gaps together"
Train = Callable[[], Rollout]
FLAT = 1e-4  # the objective's exponent at which it is the mean of the dB, to 0.01 dB


@dataclass(frozen=True)
class Variant:
    """What is trained, what it is compared with, and how."""

    name: str
    train: Train
    against: str = DEFAULT


@contextmanager
def patched(**values: Any) -> Iterator[None]:
    """Constants of lesa.training, named module__NAME, have other values meanwhile."""
    with ExitStack() as stack:
        for name, value in values.items():
            module, _, constant = name.partition("__")
            stack.enter_context(patch(f"lesa.training.{module}.{constant}", value))
        yield


class Study:
    """Trainings of one pipeline, which share its plain runs."""

    def __init__(self, name: str, calibration: int, tap: str = "output") -> None:
        self.pipe, call = load(name), settings(name)
        self.steps = call.pop("num_inference_steps")
        self.name, self.tap, self.call = name, tap, call
        self.job, self.statistics = self.collected(calibration)
        self.cost: float | None = None  # of the last training, in plain generations

    def collected(self, number: int) -> tuple[Job, Statistics]:
        """A job of so many calibration prompts, of which as many are held out as by default."""
        texts = prompts(self.name, number, seed=0, split="train")
        held = frozenset() if number < arguments.ENOUGH else arguments.held_out(None, texts, {})[1]
        job = Job(self.pipe, texts, self.call, self.tap, held_out=held)
        return job, collect(job, self.steps)

    @cache  # noqa: B019 - one study per pipeline
    def unseen(self, number: int) -> Job:
        """Unseen prompts, whose plain runs are kept as well."""
        texts = prompts(self.name, number, seed=1, split="test")
        return Job(self.pipe, texts, self.call, self.tap, seed=1000)

    def trained(
        self,
        full: int | Schedule,
        *,
        collected: tuple[Job, Statistics] | None = None,
        fields: dict[str, Any] | None = None,
        open_loop: bool = False,
        **aim: Any,
    ) -> Rollout:
        """What `lesa.train` finds for a number of full steps, or for a list.

        ``collected`` are other prompts, ``fields`` those of the forecaster, ``aim`` of
        `lesa.training.aims.Aim`; with ``open_loop`` lists are judged without the simulation.
        """
        job, statistics = collected or (self.job, self.statistics)
        plan = full if isinstance(full, Schedule) else None
        counts = [full if plan is None else len(plan.bind(self.steps).full_steps)]
        wanted = aims.Aim([self.steps], counts, plan, **aim)
        forecaster = self.untrained(statistics, **(fields or {}))
        before = job.work.rows
        with patched(**({"calibrate__judge_of": OpenLoop} if open_loop else {})):
            aims.calibrate(job, forecaster, [statistics], wanted)
        self.cost = len(job.prompts) + (job.work.rows - before) / job.rows(self.steps, 1)
        (entry,) = forecaster.calibrations
        rows = {**entry.rows, **entry.split}
        shared = {branch: entry.rows[branch] for branch in entry.split}
        return self.fixed(entry.schedule, forecaster, rows, shared)

    def untrained(self, statistics: Statistics, **fields: Any) -> LesaForecaster:
        known = dict(branches=statistics.branches, num_steps=statistics.num_steps, tap=self.tap)
        known |= {"uses_latent": statistics.has_latent, "form": "table"}
        return LesaForecaster(**{**known, **fields})

    def fixed(
        self,
        plan: Schedule,
        forecaster: LesaForecaster,
        rows: dict[str, Tensor],
        shared: dict[str, Tensor] | None = None,
    ) -> Rollout:
        """A rollout of rows as they are."""
        history, latent = forecaster.settings.history, forecaster.uses_latent
        return Rollout(
            RolloutSpec(plan, history, latent, frozen=True, rows=rows, shared=shared or {})
        )

    def judge(self, rollouts: Sequence[Rollout], unseen: int) -> list[Tensor]:
        """dB of the final latents of unseen prompts, ``[pictures]`` for each rollout."""
        apart = [rollout for rollout in rollouts if isinstance(rollout, GroupedRollout)]
        others = [rollout for rollout in rollouts if not isinstance(rollout, GroupedRollout)]
        # Runs of equal specs share what they compute, but groups are no part of a spec.
        for together in (others, *([rollout] for rollout in apart)):
            run_rollouts(self.unseen(unseen), together, self.prior, self.steps, self.statistics)
        scores = [rollout.result.score for rollout in rollouts]
        return [score for score in scores if score is not None]

    def prior(self, plan: Schedule, sigmas: Sequence[float], branch: str) -> Tensor:
        """The rows that a fit begins with."""
        return self.open_loop(plan).spec.rows[branch].clone()

    def budgeted(self, count: int, share: float) -> Budget:
        """So many times what the calibration of a number of full steps costs by default."""
        many = len(self.job.prompts)
        each = Budget().per_prompt(count, 1, self.steps, many)
        return Budget(generations=many * (1 + share * each))

    def open_loop(self, plan: Schedule) -> Rollout:
        """The rows that the statistics alone give."""
        forecaster = self.untrained(self.statistics)
        Calibrator(self.job, forecaster, self.statistics).store_open_loop(plan.full_steps)
        return self.fixed(plan, forecaster, forecaster.calibrations[0].rows)

    def form(self, plan: Schedule, **fields: Any) -> Rollout:
        """The coefficients of continuous time alone, or, of form="table", a line."""
        learned = self.untrained(self.statistics, **{"form": "continuous", **fields})
        if learned.form == "continuous":
            fit_continuous(learned, [self.statistics])
        levels = self.statistics.sigmas
        rows = {b: learned.net.rows(plan, levels, b)[0].detach() for b in learned.branches}
        return self.fixed(plan, learned, rows)

    def edges(self, plan: Schedule) -> Rollout:
        """The best of some edges of stages, as accelerated runs show them."""
        rollouts = [self.form(plan, stages=edges) for edges in EDGES]
        run_rollouts(self.job, rollouts, None, self.steps, self.statistics)
        return max(rollouts, key=quality)

    def grouped(self, plan: Schedule, groups: str, edges: tuple[float, ...] = ()) -> Rollout:
        """A row of coefficients for each group of a feature's elements."""
        rollouts = [
            GroupedRollout(RolloutSpec(plan, 3, True, drift), groups=groups, edges=edges)
            for drift in (0.5, 1.0)
        ]
        run_rollouts(self.job, rollouts, self.prior, self.steps, self.statistics)
        best = max(rollouts, key=quality)
        return replace(best, spec=replace(best.spec, frozen=True))
