"""What a guard would gain: `python benchmarks/bench_guard.py`.

A guard looks at a full step whether a picture is at risk, and gives such a picture further full
steps. That pays where three things hold, each measured here on unseen prompts of every embedded
pipeline of 50 steps, at 10 full steps and the list that training chooses:

- a signal at an early full step ranks the pictures: Spearman's rho between the signal and the final
  PSNR, with the sign by which +1 is a perfect guard;
- further full steps after it mend a bad picture: everybody gets two, in the widest gaps or in the
  very next ones;
- the guard finds the right ones: the quarter at risk by the signal, and by an oracle who knows the
  final PSNR.

And for both kinds of guard (`lesa.forecasters.guard`): what training on 64 prompts finds, kept here
whatever it gains, then run on the unseen prompts one by one.

Signals are relative to the largest of the calibration prompts, and a picture's is that of its worst
branch or guidance part: `change` is |v_s - v_p| / |v_s| since the full step p before s, `line` the
error of the line in noise level through the two before. benchmarks/results/guard.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import torch
from _environment import RESULTS, environment, write
from bench_transfer import forecaster_of
from torch import Tensor

import lesa
from lesa.core.schedule import Schedule
from lesa.engine.output_tap import OutputTap
from lesa.hooks.attach import attached
from lesa.hooks.denoiser import Call, Run
from lesa.hooks.pipeline import find_denoisers
from lesa.testbed import load, prompts, settings
from lesa.training import guard as guards
from lesa.training.budget import EXTRA
from lesa.training.objective import objective
from lesa.util.perceptual import psnr

PIPELINES = ("flux", "qwen", "hunyuan", "sdxl")
BATCH, SHARE = 8, 4  # prompts at once; one picture in so many
SEEN = 64  # prompts that a guard is trained on


class Recorder(OutputTap):
    """The output tap, and for every full step after the first how far its feature has moved."""

    def __init__(self, pictures: int) -> None:
        self.pictures = pictures
        self.found: dict[str, dict[int, Tensor]] = {"change": {}, "line": {}}
        self._before: dict[str, list[tuple[float, Tensor]]] = {}

    def take(self, call: Call, run: Run) -> Tensor | None:
        feature = super().take(call, run)
        assert feature is not None
        step = call.step
        past = self._before.setdefault(step.branch, [])
        level, now = step.sigmas[step.index], feature.float().flatten(1)
        if past:
            newest, last = past[-1]
            self._note("change", step.index, now - last, now)
            line = last
            if len(past) > 1:
                before, earlier = past[-2]
                line = last + (level - newest) / (newest - before) * (last - earlier)
            self._note("line", step.index, now - line, now)
        past.append((level, now))
        return feature

    def _note(self, signal: str, step: int, moved: Tensor, now: Tensor) -> None:
        """Keep the largest of a picture's branches and guidance parts."""
        share = (moved.norm(dim=1) / now.norm(dim=1)).view(-1, self.pictures).amax(0)
        known = self.found[signal].get(step)
        self.found[signal][step] = share if known is None else torch.maximum(known, share)


def generate(
    pipe: Any, call: dict[str, Any], texts: Sequence[str], seed: int
) -> tuple[Tensor, dict[str, dict[int, Tensor]]]:
    """Pictures of all prompts as floats; if lesa is enabled, the signals by full step [prompts]."""
    pictures, found = [], []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(some))]
        known = attached(find_denoisers(pipe)[0])
        recorder = Recorder(len(some))
        if known is not None:
            controller: Any = known.controller
            controller.tap = recorder
        given = {"output_type": "pt", "return_dict": False, **call}
        pictures.append(pipe(prompt=list(some), generator=noise, **given)[0].float())
        found.append(recorder.found)
    joined = {
        signal: {step: torch.cat([part[signal][step] for part in found]) for step in steps}
        for signal, steps in found[0].items()
    }
    return torch.cat(pictures), joined


def widest(schedule: Schedule, sigmas: Sequence[float], place: int) -> Schedule:
    """`EXTRA` full steps more behind one of its own, each in the middle of the widest gap in noise
    level."""
    ends = pairwise((*schedule.full_steps[place:], schedule.steps))
    gaps = sorted(
        ((low, high) for low, high in ends if high - low > 1),
        key=lambda gap: sigmas[gap[1]] - sigmas[gap[0]],
    )
    added = [(low + high) // 2 for low, high in gaps[:EXTRA]]
    return Schedule.explicit([*schedule.full_steps, *added], schedule.steps)


def nearest(schedule: Schedule, _sigmas: Sequence[float], place: int) -> Schedule:
    """`EXTRA` full steps more, one in the middle of each of the gaps next to come, as a guard."""
    return guards.with_extra(schedule, place) or schedule


def spearman(signal: Tensor, decibels: Tensor) -> float:
    """Rank correlation of the signal with the loss of quality."""
    ranks = torch.stack([signal.argsort().argsort(), (-decibels).argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@contextmanager
def kept_whatever_it_gains() -> Iterator[list[float]]:
    """Lets training keep any guard; what it says that the signal gains, in dB of the objective."""
    told, choose, least = [], guards.choose, guards.GAIN

    def noted(*arguments: Any) -> tuple[float | None, float]:
        limit, gain = choose(*arguments)
        told.append(gain)
        return limit, gain

    guards.choose, guards.GAIN = noted, -inf
    try:
        yield told
    finally:
        guards.choose, guards.GAIN = choose, least


def trained(
    name: str, pipe: Any, call: dict[str, Any], texts: Sequence[str], plain: Tensor, kind: Any
) -> dict[str, Any]:
    """What training makes of a guard, and what that gives on unseen prompts."""
    seen, own = prompts(name, SEEN, seed=0, split="train"), dict(call)
    steps = own.pop("num_inference_steps")
    with kept_whatever_it_gains() as told:
        forecaster = lesa.train(pipe, seen, steps, 10, guard=kind, progress=False, call=own)
    entry = forecaster.calibrations[0]
    found: dict[str, Any] = {"kind": kind, "full_steps": entry.schedule.full_steps}
    found["expected"] = told[0] if told else None
    if entry.guard is None:
        return found

    def run(**options: Any) -> Tensor:
        with lesa.accelerate(pipe, forecaster, **options):
            return psnr(plain, generate(pipe, call, texts, 1000)[0])

    off, other = run(guard="off"), run(schedule=entry.guard.schedule)
    on, counts = [], []
    with lesa.accelerate(pipe, forecaster):
        for i, text in enumerate(texts):
            noise = torch.Generator().manual_seed(1000 + i)
            given = {"output_type": "pt", "return_dict": False, **call}
            picture = pipe(prompt=[text], generator=[noise], **given)[0].float()
            on.append(psnr(plain[i : i + 1], picture))
            counts.append(len(lesa.stats(pipe).full_steps))
        at_risk = lesa.stats(pipe).guarded
    guarded, share = torch.cat(on), at_risk / len(texts)
    weights = torch.tensor([1 - share, share]).repeat_interleave(len(texts))
    chance = max(objective(torch.cat([off, other]), weights), objective(off))
    return found | {
        "step": entry.guard.step,
        "instead": entry.guard.schedule.full_steps,
        "at_risk": at_risk,
        "mean_full_steps": sum(counts) / len(counts),
        "gain": objective(guarded) - chance,
        "off": summary(off),
        "on": summary(guarded),
        "everybody": summary(other),
        "oracle": summary(torch.maximum(off, other)),
    }


def summary(decibels: Tensor) -> dict[str, float]:
    """Mean, 10th percentile and minimum."""
    found = decibels.mean(), decibels.quantile(0.1), decibels.min()
    return dict(zip(("mean", "p10", "minimum"), map(float, found), strict=True))


def measure(name: str, unseen: int) -> dict[str, Any]:
    """All that the module's docstring lists, of one pipeline."""
    pipe, call = load(name), settings(name)
    pipe.set_progress_bar_config(disable=True)
    forecaster = forecaster_of(name, pipe, None)
    entry = forecaster.calibrations[0]
    plan, sigmas = entry.schedule, entry.sigmas
    texts = prompts(name, unseen, seed=1, split="test")
    plain, _ = generate(pipe, call, texts, 1000)

    def run(schedule: Schedule) -> tuple[Tensor, dict[str, dict[int, Tensor]]]:
        with lesa.accelerate(pipe, forecaster, schedule=schedule):
            found, signals = generate(pipe, call, texts, 1000)
        return psnr(plain, found), signals

    with lesa.accelerate(pipe, forecaster, schedule=plan):
        _, seen = generate(pipe, call, prompts(name, 16, seed=0, split="train"), 0)
    base, signals = run(plan)
    risk = {
        signal: {step: value / seen[signal][step].max() for step, value in steps.items()}
        for signal, steps in signals.items()
    }
    found = {
        "pipeline": name,
        "full_steps": plan.full_steps,
        "base": summary(base),
        "rho": {
            signal: {step: spearman(value, base) for step, value in steps.items()}
            for signal, steps in risk.items()
        },
        "rows": list(_policies(plan, sigmas, base, risk, lambda schedule: run(schedule)[0])),
    }
    found["trained"] = [
        trained(name, pipe, call, texts, plain, kind) for kind in ("route", "spend")
    ]
    _tell(found)
    return found


def _policies(
    plan: Schedule,
    sigmas: Sequence[float],
    base: Tensor,
    risk: dict[str, dict[int, Tensor]],
    run: Callable[[Schedule], Tensor],
) -> Iterator[dict[str, Any]]:
    """A row per early full step at which a guard could decide, and place of the further steps."""
    quarter = len(base) // SHARE
    for place, step in enumerate(plan.full_steps[1:3], 1):
        for where in (widest, nearest):
            schedule = where(plan, sigmas, place)
            more = run(schedule)
            row = {"decided_at": step, "where": where.__name__, "full_steps": schedule.full_steps}
            row["everybody"] = summary(more)
            chosen = {"oracle": base.argsort()[:quarter]}
            for signal, steps in risk.items():
                worst = torch.stack([v for s, v in steps.items() if s <= step]).amax(0)
                chosen[signal] = worst.argsort(descending=True)[:quarter]
            for who, at in chosen.items():
                mixed = base.clone()
                mixed[at] = more[at]
                row[who] = summary(mixed)
            yield row


def _tell(found: dict[str, Any]) -> None:
    def shown(values: dict[str, float]) -> str:
        return " / ".join(f"{value:.1f}" for value in values.values())

    print(f"{found['pipeline']}: {found['full_steps']}: {shown(found['base'])}")
    for signal, steps in found["rho"].items():
        print(f"  rho of {signal}:", {step: round(value, 2) for step, value in steps.items()})
    for row in found["rows"]:
        policies = ("change", "line", "oracle", "everybody")
        told = ", ".join(f"{who} {shown(row[who])}" for who in policies)
        print(f"  at {row['decided_at']}, {row['where']}: {told}")
    for row in found["trained"]:
        print(f"  {row}", flush=True)


def arguments(about: str, file: str) -> argparse.Namespace:
    """What is measured, and where the file goes; the threads are set."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--unseen", type=int, default=64, help="test prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of {file}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def main() -> None:
    options = arguments(__doc__, "guard.json")
    found = [measure(name, options.unseen) for name in options.pipelines]
    report = {"environment": environment(), "unseen_prompts": options.unseen, "pipelines": found}
    write(options.out / "guard.json", report)


if __name__ == "__main__":
    main()
