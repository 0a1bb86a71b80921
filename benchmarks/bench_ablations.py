"""What each part of lesa is worth: `python benchmarks/bench_ablations.py --pipelines flux`.

The reference is what `lesa.train` does by default. Every variant is trained on the same calibration
prompts, of which as many are held out, and with the same budget unless that is what varies; then
all run the same unseen prompts beside the plain run. Measured in dB of the final latent (its mean
square over the mean squared error), prompt by prompt, and as a paired difference with its bootstrap
interval. What changes the search has a list of its own; what changes the coefficients runs on the
default's list. Variants without the last fit of all gaps together are compared with the default
without it. benchmarks/results/ablations.json keeps the pipelines that are not asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _ablation_study import DEFAULT, FLAT, STEP_BY_STEP, Study, Variant, patched
from _environment import RESULTS, environment, write
from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.evaluation.intervals import bootstrap, mean
from lesa.testbed import PIPELINES
from lesa.training.rollout import Rollout

COUNTS = (13, 10, 8, 6)
PROMPTS = (1, 5, 10, 50, 100)  # calibration prompts that are tried
STAGES = {"one stage": (), "5 stages": (0.95, 0.85, 0.6, 0.3)}
BANDS = {"2 frequency bands": (0.25,), "4 frequency bands": (0.12, 0.25, 0.5)}


def searches(study: Study, count: int) -> Iterator[Variant]:
    """What changes how the step list is found."""

    def under(**values: Any) -> Rollout:
        with patched(**values):
            return study.trained(count)

    def none(*_: Any) -> float:
        return 0.0

    unheld = replace(study.job, held_out=frozenset()), study.statistics
    even = Schedule.fora(-(-study.steps // count), study.steps)
    late = {"calibrate__handicap": none, "search__handicap": none}
    yield Variant("list by the statistics alone", lambda: study.trained(count, race=False))
    yield Variant("lists judged without a simulation", lambda: study.trained(count, open_loop=True))
    yield Variant("objective: the mean error", lambda: under(objective__EXPONENT=1.0))
    yield Variant("objective: the mean of the dB", lambda: under(objective__EXPONENT=FLAT))
    yield Variant("no handicap of a late second full step", lambda: under(**late))
    yield Variant("no prompts held out", lambda: study.trained(count, collected=unheld))
    yield Variant("no search: evenly spread", lambda: study.trained(even))
    for name, share in (("half the budget", 0.5), ("twice the budget", 2.0)):
        budget = study.budgeted(count, share)
        yield Variant(name, lambda budget=budget: study.trained(count, budget=budget))


def fits(study: Study, plan: Schedule) -> Iterator[Variant]:
    """What changes the coefficients on a list."""

    def under(**values: Any) -> Rollout:
        with patched(**values):
            return study.trained(plan)

    undrifted = {"calibrate__DRIFTS": (0.0,), "calibrate__GENTLE": (0.0,)}
    yield Variant(STEP_BY_STEP, lambda: study.trained(plan, polish=0))
    yield Variant("no drift correction", lambda: under(**undrifted))
    yield Variant("no caution at high noise", lambda: under(calibrate__SHRINKAGES=(0.0,)))
    without = {"uses_latent": False}
    yield Variant("no current latent", lambda: study.trained(plan, fields=without))
    for k in (1, 2, 4, 5):
        fields = {"history": k}
        yield Variant(f"history of {k}", lambda f=fields: study.trained(plan, fields=f))
    open_loop = "open loop: least squares on the statistics"
    yield Variant(open_loop, lambda: study.open_loop(plan), STEP_BY_STEP)


def forms(study: Study, plan: Schedule) -> Iterator[Variant]:
    """Other coefficients, fitted step by step or not at all."""
    kan = "continuous KAN alone"
    yield Variant(kan, lambda: study.form(plan), STEP_BY_STEP)
    for name, stages in STAGES.items():
        train = lambda stages=stages: study.form(plan, stages=stages)  # noqa: E731
        yield Variant(f"{kan}, {name}", train, STEP_BY_STEP)
    yield Variant(f"{kan}, edges searched", lambda: study.edges(plan), STEP_BY_STEP)
    line = "nothing learned: a line in sigma"
    yield Variant(line, lambda: study.form(plan, form="table"), STEP_BY_STEP)
    if study.name in ("flux", "qwen"):  # packed latents
        channels = "coefficients per channel"
        yield Variant(channels, lambda: study.grouped(plan, "channel"), STEP_BY_STEP)
        for name, edges in BANDS.items():
            train = lambda edges=edges: study.grouped(plan, "band", edges)  # noqa: E731
            yield Variant(name, train, STEP_BY_STEP)


def other_prompts(study: Study, count: int, numbers: Sequence[int]) -> Iterator[Variant]:
    """The default training on other numbers of calibration prompts."""
    for number in numbers:
        yield Variant(
            f"{number} calibration prompts",
            lambda number=number: study.trained(count, collected=study.collected(number)),
        )


def hidden(other: Study, plan: Schedule, unseen: int) -> dict[str, tuple[str, Tensor]]:
    """Name -> what it is compared with, and scores, of the hidden tap on a step list."""
    study = Study(other.name, len(other.job.prompts), tap="hidden")
    rollouts = [study.trained(plan), study.open_loop(plan)]
    trained, plain = study.judge(rollouts, unseen)
    return {
        "hidden tap": (DEFAULT, trained),
        "hidden tap, least squares on its features": (STEP_BY_STEP, plain),
    }


def row(
    name: str, count: int, scores: Tensor, against: str, reference: Tensor, **more: Any
) -> dict[str, Any]:
    """A variant against what it is compared with, prompt by prompt; and what its training took."""
    gain = bootstrap(mean, scores - reference)
    found = {
        "variant": name,
        "full_steps": count,
        "mean": scores.mean().item(),
        "p10": scores.quantile(0.1).item(),
        "min": scores.min().item(),
        "against": against,
        "difference": gain,
        **more,
    }
    print(
        f"{count:3d} {name:44} {found['mean']:6.2f} {found['p10']:6.2f} {found['min']:6.2f}"
        f"  {gain['value']:+6.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]",
        flush=True,
    )
    return found


def measured(
    study: Study, count: int, unseen: int, numbers: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The rows of one number of full steps."""
    trained: dict[str, Rollout] = {}
    facts: dict[str, dict[str, Any]] = {}
    compared: dict[str, str] = {}

    def train(variant: Variant) -> Rollout:
        started, study.cost = time.perf_counter(), None
        trained[variant.name], compared[variant.name] = variant.train(), variant.against
        seconds = time.perf_counter() - started
        facts[variant.name] = {"train_seconds": seconds, "generations": study.cost}
        print(f"trained in {seconds:.0f} s: {count} full steps, {variant.name}", flush=True)
        return trained[variant.name]

    plan = train(Variant(DEFAULT, lambda: study.trained(count))).spec.schedule
    for variant in (*searches(study, count), *fits(study, plan), *forms(study, plan)):
        train(variant)
    for variant in other_prompts(study, count, numbers):
        train(variant)
    scores = dict(zip(trained, study.judge([*trained.values()], unseen), strict=True))
    for name, score in scores.items():
        against = compared[name]
        facts[name]["list"] = trained[name].spec.schedule.full_steps
        yield row(name, count, score, against, scores[against], **facts[name])
    for name, (against, score) in hidden(study, plan, unseen).items() if numbers else ():
        yield row(name, count, score, against, scores[against])


def measure(
    name: str, calibration: int, counts: Sequence[int], unseen: int, numbers: Sequence[int]
) -> dict[str, Any]:
    """All rows of one pipeline; other numbers of prompts and the hidden tap at 10 full steps."""
    study, rows = Study(name, calibration), []
    for count in counts:
        rows += measured(study, count, unseen, numbers if count == 10 else ())
    return {
        "environment": environment(),
        "calibration_prompts": calibration,
        "unseen_prompts": unseen,
        "steps": study.steps,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", default="flux", help=f"a comma list of {PIPELINES}")
    parser.add_argument("--full-steps", default=",".join(map(str, COUNTS)))
    parser.add_argument("--prompts", type=int, default=16, help="calibration prompts")
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
        report[name] = measure(name, options.prompts, counts, options.unseen, numbers)
        write(path, report)


if __name__ == "__main__":
    main()
