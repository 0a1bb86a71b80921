"""What each part of lesa is worth: `python benchmarks/bench_ablations.py --pipelines flux`.

Every variant is trained on the same calibration prompts and then runs the same unseen prompts in
one call of the pipeline, beside the plain run. Measured in dB of the final latent (its mean square
over the mean squared error), prompt by prompt, and as a paired difference, with its bootstrap
interval, from the coefficients that `lesa.train` has before it fits all gaps together: the other
variants have not had that last fit either. At 10 full steps also numbers of calibration prompts and
the hidden tap; below the largest count also a guard, which gives some prompts the next larger
count. benchmarks/results/ablations.json keeps the pipelines that are not asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _environment import RESULTS, environment, write
from _richer import GroupedRollout, WatchedRollout
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.evaluation.intervals import bootstrap, mean
from lesa.forecasters import LesaForecaster
from lesa.testbed import load, prompts, settings
from lesa.training import search
from lesa.training.calibrate import Calibrator
from lesa.training.closed_loop import run_rollouts
from lesa.training.collect import collect
from lesa.training.fit import fit_continuous
from lesa.training.job import Job
from lesa.training.rollout import Rollout, RolloutSpec, quality
from lesa.training.statistics import Statistics

REFERENCE = "step by step in closed loop"  # what every other row is compared with
COUNTS = (13, 10, 8, 6)
PROMPTS = (1, 5, 10, 50, 100)  # calibration prompts that are tried
CALIBRATION = 16
EDGES = ((0.95, 0.7), (0.9, 0.4), (0.8, 0.5), (0.7, 0.3), (0.6,))  # of stages, that compete
GUARDED = 8  # one prompt in so many gets more full steps


def frozen(rollout: Rollout) -> Rollout:
    """A fitted rollout, to be run as it is on other prompts."""
    if isinstance(rollout, GroupedRollout):
        return replace(rollout, spec=replace(rollout.spec, frozen=True))
    fitted = rollout.spec.rows is None
    return WatchedRollout(rollout.fixed().spec) if fitted else Rollout(rollout.spec)


class Study:
    """The default training of one pipeline, and variants of it."""

    def __init__(self, name: str, calibration: int, tap: str = "output") -> None:
        self.pipe, call = load(name), settings(name)
        self.steps = call.pop("num_inference_steps")
        self.name = name
        self.job = Job(self.pipe, prompts(name, calibration, seed=0, split="train"), call, tap)
        self.statistics = collect(self.job, self.steps)
        self.calibrator = self.calibrate(self.job, self.statistics)

    def calibrate(self, job: Job, statistics: Statistics, **fields: Any) -> Calibrator:
        """A calibrator whose forecaster has its continuous coefficients fitted already."""
        known = dict(branches=statistics.branches, num_steps=statistics.num_steps, tap=job.tap)
        learned = LesaForecaster(**{**known, "uses_latent": statistics.has_latent, **fields})
        if learned.form == "continuous":
            fit_continuous(learned, [statistics])
        return Calibrator(job, learned, statistics)

    def leaders(self, counts: Sequence[int]) -> list[Rollout]:
        """What `lesa.train` finds before it fits all gaps together."""
        return self.calibrator.refine(self.calibrator.fit(self.calibrator.search(counts)), 2)

    def variants(self, leader: Rollout) -> dict[str, Callable[[], Rollout]]:
        """Name -> the rollout that is trained for it, all at the leader's number of full steps."""
        plan = leader.spec.schedule
        count = len(plan.full_steps)
        fit = self.calibrator.fit
        known = {
            REFERENCE: lambda: leader,
            "and all gaps together: the default": lambda: self.calibrator.joint_fit([leader], 2)[0],
            "no drift correction": lambda: self._fitted(leader, drift=0.0),
            "no caution at high noise": lambda: self._fitted(leader, shrinkage=0.0),
            "no current latent": lambda: self._with(plan, uses_latent=False),
            "no search: evenly spread": lambda: fit(
                [Schedule.fora(-(-self.steps // count), self.steps)]
            )[0],
            "no search by accelerated runs": lambda: fit(self.calibrator.search([count]))[0],
            "search for the mean alone": lambda: self._mean_only(count),
            "open loop: least squares on the statistics": lambda: self._open_loop(plan),
            "continuous KAN alone": lambda: self._form(self.calibrator, plan),
            "continuous KAN alone, one stage": lambda: self._form(self._net(stages=()), plan),
            "continuous KAN alone, 5 stages": lambda: self._form(
                self._net(stages=(0.95, 0.85, 0.6, 0.3)), plan
            ),
            "continuous KAN alone, edges searched": lambda: self._edges(plan),
            "nothing learned: a line in sigma": lambda: self._form(self._net(form="table"), plan),
            "closed loop repeated until it stops helping": lambda: self._again(leader),
        }
        known |= {f"history of {k}": lambda k=k: self._with(plan, history=k) for k in (1, 2, 4, 5)}
        if self.name in ("flux", "qwen"):
            known |= {
                "coefficients per channel": lambda: self._grouped(leader, "channel"),
                "2 frequency bands": lambda: self._grouped(leader, "band", (0.25,)),
                "4 frequency bands": lambda: self._grouped(leader, "band", (0.12, 0.25, 0.5)),
            }
        return known

    def on_prompts(self, count: int, number: int) -> Rollout:
        """The default training on another number of calibration prompts."""
        job = replace(self.job, prompts=prompts(self.name, number, seed=0, split="train"))
        calibrator = self.calibrate(job, collect(job, self.steps))
        return calibrator.refine(calibrator.fit(calibrator.search([count])), 2)[0]

    def judge(self, rollouts: Sequence[Rollout], unseen: int) -> list[Rollout]:
        """The rollouts after a run on unseen prompts, which gives each its scores: dB of the final
        latents."""
        texts = prompts(self.name, unseen, seed=1, split="test")
        ready = [frozen(rollout) for rollout in rollouts]
        job = replace(self.job, prompts=texts, seed=1000)
        run_rollouts(job, ready, self.calibrator._prior, self.steps, self.statistics)
        return ready

    def _fitted(self, leader: Rollout, **fields: Any) -> Rollout:
        rollout = Rollout(replace(leader.spec, **fields))
        run_rollouts(self.job, [rollout], self.calibrator._prior, self.steps, self.statistics)
        return rollout

    def _with(self, plan: Schedule, **fields: Any) -> Rollout:
        return self.calibrate(self.job, self.statistics, **fields).fit([plan])[0]

    @cache  # noqa: B019 - one study per pipeline
    def _net(self, **fields: Any) -> Calibrator:
        return self.calibrate(self.job, self.statistics, **fields)

    def _form(self, calibrator: Calibrator, plan: Schedule) -> Rollout:
        sigmas = self.statistics.sigmas
        rows = {b: calibrator._prior(plan, sigmas, b) for b in self.statistics.branches}
        return Rollout(RolloutSpec(plan, 3, True, frozen=True, rows=rows))

    def _edges(self, plan: Schedule) -> Rollout:
        rollouts = [self._form(self._net(stages=edges), plan) for edges in EDGES]
        run_rollouts(self.job, rollouts, None, self.steps, self.statistics)
        return max(rollouts, key=quality)

    def _open_loop(self, plan: Schedule) -> Rollout:
        judge, rows = self.calibrator.judge, {}
        has_latent = self.statistics.has_latent
        for branch in self.statistics.branches:
            rows[branch] = torch.zeros(self.steps, 3 + has_latent, dtype=torch.float64)
            for step in plan.skipped_steps:
                cached = plan.cached_before(step, 3)
                _, weights = judge.coefficients(branch, step, cached)
                rows[branch][step, : len(cached)] = torch.tensor(weights[: len(cached)])
                if has_latent:
                    rows[branch][step, -1] = weights[-1]
        return Rollout(RolloutSpec(plan, 3, has_latent, frozen=True, rows=rows))

    def _mean_only(self, count: int) -> Rollout:
        share, search.TAIL_SHARE = search.TAIL_SHARE, 0.0
        try:
            return self.leaders([count])[0]
        finally:
            search.TAIL_SHARE = share

    def _again(self, leader: Rollout) -> Rollout:
        rows, rollout = leader.result.coefficients, Rollout(replace(leader.spec, ridge=1e-3))

        def known(_plan: Schedule, _sigmas: Sequence[float], branch: str) -> Tensor:
            return rows[branch].clone()

        run_rollouts(self.job, [rollout], known, self.steps, self.statistics)
        return self._again(rollout) if quality(rollout) > quality(leader) else leader

    def _grouped(self, leader: Rollout, groups: str, edges: tuple[float, ...] = ()) -> Rollout:
        plan = leader.spec.schedule
        rollouts = [
            GroupedRollout(RolloutSpec(plan, 3, True, drift), groups=groups, edges=edges)
            for drift in (0.3, 0.6, 1.0)
        ]
        run_rollouts(self.job, rollouts, self.calibrator._prior, self.steps, self.statistics)
        return max(rollouts, key=quality)


def row(
    name: str, count: int, scores: Tensor, reference: Tensor, seconds: float | None
) -> dict[str, Any]:
    """A variant against the reference, prompt by prompt; `seconds` of its training alone."""
    gain = bootstrap(mean, scores - reference)
    found = {
        "variant": name,
        "full_steps": count,
        "mean": scores.mean().item(),
        "p10": scores.quantile(0.1).item(),
        "min": scores.min().item(),
        "difference": gain,
        "train_seconds": seconds,
    }
    print(
        f"{count:3d} {name:44} {found['mean']:6.2f} {found['p10']:6.2f} {found['min']:6.2f}"
        f"  {gain['value']:+6.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]",
        flush=True,
    )
    return found


def guards(more: int, watched: Rollout, richer: Tensor) -> dict[str, Tensor]:
    """Name -> scores where one prompt in eight runs with the next larger number of full steps:
    those with the largest forecast errors in the first half of the run, or, as a bound, those that
    end worst."""
    assert isinstance(watched, WatchedRollout) and watched.result.score is not None
    found = {}
    signals = {
        "largest early forecast error": watched.surprise(),
        "worst end": -watched.result.score,
    }
    for name, signal in signals.items():
        chosen = signal.argsort(descending=True)[: len(signal) // GUARDED]
        scores = watched.result.score.clone()
        scores[chosen] = richer[chosen]
        found[f"{more} full steps for the eighth with the {name}"] = scores
    return found


def hidden(name: str, plan: Schedule, unseen: int) -> dict[str, Tensor]:
    """Name -> scores of the hidden tap on a step list, by what its rows are fitted to."""
    study = Study(name, CALIBRATION, tap="hidden")
    rollouts = {
        "hidden tap, rows fitted to the outputs behind it": study.calibrator.fit([plan])[0],
        "hidden tap, least squares on its features": study._open_loop(plan),
    }
    judged = study.judge(list(rollouts.values()), unseen)
    return dict(zip(rollouts, (rollout.result.score for rollout in judged), strict=True))


def measure(
    name: str, counts: Sequence[int], unseen: int, numbers: Sequence[int]
) -> dict[str, Any]:
    """All rows of one pipeline."""
    study, rows, larger = Study(name, CALIBRATION), [], None
    for leader in study.leaders(counts):
        plan = leader.spec.schedule
        count, trained, seconds = len(plan.full_steps), {}, {}
        variants = study.variants(leader)
        if count == 10:
            variants |= {
                f"{n} calibration prompts": lambda n=n: study.on_prompts(10, n) for n in numbers
            }
        for variant, train in variants.items():
            started = time.perf_counter()
            trained[variant] = train()
            seconds[variant] = time.perf_counter() - started
        judged = dict(zip(trained, study.judge(list(trained.values()), unseen), strict=True))
        scores = {variant: rollout.result.score for variant, rollout in judged.items()}
        reference = scores[REFERENCE]
        scores |= hidden(name, plan, unseen) if count == 10 else {}
        if larger is not None:
            scores |= guards(larger[0], judged[REFERENCE], larger[1])
        larger = count, reference
        rows += [
            row(variant, count, score, reference, seconds.get(variant))
            for variant, score in scores.items()
        ]
    return {
        "environment": environment(),
        "calibration_prompts": CALIBRATION,
        "unseen_prompts": unseen,
        "steps": study.steps,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", default="flux", help="a comma list")
    parser.add_argument("--full-steps", default=",".join(map(str, COUNTS)))
    parser.add_argument("--numbers", default=",".join(map(str, PROMPTS)), help="of prompts")
    parser.add_argument("--unseen", type=int, default=64, help="test prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of ablations.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = options.out / "ablations.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    counts, numbers = (
        [int(part) for part in text.split(",") if part]
        for text in (options.full_steps, options.numbers)
    )
    for name in options.pipelines.split(","):
        report[name] = measure(name, counts, options.unseen, numbers)
        write(path, report)


if __name__ == "__main__":
    main()
