"""Record what the figures of docs/how-it-works.md show: `python docs/figures/measure.py`.

Trains on the embedded FLUX as the results do (16 prompts, 10 and 6 of 50 steps in full), runs one
unseen prompt, and writes docs/figures/flux.json, from which docs/figures/draw.py draws.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lesa
from lesa.core.schedule import Schedule
from lesa.training import calibrate

OUT = Path(__file__).parent / "flux.json"
COUNTS, SHOWN, SEED = (10, 6), 10, 1000


def raced() -> list[dict[str, Any]]:
    """A list that fills while `lesa.train` runs: every step list that an accelerated run judged."""
    found: list[dict[str, Any]] = []
    judge = calibrate.quality

    def recorded(rollout: Any) -> float:
        worth = judge(rollout)
        prompts = len(rollout.result.score)
        full_steps = rollout.spec.schedule.full_steps
        found.append({"full_steps": full_steps, "dB": round(worth, 2), "prompts": prompts})
        return worth

    calibrate.quality = recorded
    return found


class Run:
    """What a generation's sampler got and made: the denoiser's outputs, forecasts among them, and
    the latents after each step, both [S, elements]."""

    def __init__(self, pipe: Any, prompt: str) -> None:
        seen: list[tuple[Tensor, Tensor]] = []
        step = pipe.scheduler.step

        def watched(output: Tensor, *others: Any, **named: Any) -> Any:
            made = step(output, *others, **named)
            seen.append((output.double().flatten(), made[0].double().flatten()))
            return made

        pipe.scheduler.step = watched
        try:
            generator = torch.Generator().manual_seed(SEED)
            pipe(prompt, generator=generator, output_type="latent", **lesa.testbed.settings())
        finally:
            del pipe.scheduler.step
        self.outputs, self.latents = map(torch.stack, zip(*seen, strict=True))


def projected(plain: Run, runs: dict[str, Run]) -> dict[str, Any]:
    """All runs' outputs on the two axes along which the plain run's move most, those axes' share,
    and how far each run's latents are from the plain run's, as a share of the final latent."""
    centre = plain.outputs.mean(0)
    _, sizes, axes = torch.linalg.svd(plain.outputs - centre, full_matrices=False)
    share = (sizes[:2].square().sum() / sizes.square().sum()).item()
    final = plain.latents[-1].norm()
    return {
        "share": share,
        "places": {
            name: ((run.outputs - centre) @ axes[:2].T).tolist() for name, run in runs.items()
        },
        "errors": {
            name: ((run.latents - plain.latents).norm(dim=1) / final).tolist()
            for name, run in runs.items()
        },
    }


def accelerated(pipe: Any, prompt: str, forecaster: Any, full_steps: Sequence[int]) -> Run:
    """A run with these full steps."""
    with lesa.accelerate(pipe, forecaster, schedule=Schedule.explicit(full_steps, 50)):
        return Run(pipe, prompt)


def rounded(value: Any) -> Any:
    """Plain values whose floats have five digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def main() -> None:
    pipe, call = lesa.testbed.load(), lesa.testbed.settings()
    races = raced()
    forecaster = lesa.train(pipe, lesa.testbed.captions(16, split="train"), 50, COUNTS, call=call)
    lists = {str(len(s.full_steps)): list(s.full_steps) for s in forecaster.calibrated}
    [prompt] = lesa.testbed.captions(1, split="test")
    plain = Run(pipe, prompt)
    shown = lists[str(SHOWN)]
    runs = {
        "plain": plain,
        "lesa": accelerated(pipe, prompt, forecaster, shown),
        "line": accelerated(pipe, prompt, lesa.Taylor(order=1), shown),
        "reuse": accelerated(pipe, prompt, lesa.Reuse(), shown),
    }
    entries = {str(len(e.schedule.full_steps)): e for e in forecaster.calibrations}
    tables = {
        count: forecaster.table(
            entry.schedule, entry.sigmas, forecaster.branches[0]
        ).coefficients.tolist()
        for count, entry in entries.items()
    }
    record = {
        "prompt": prompt,
        "seed": SEED,
        "lesa": lesa.__version__,
        "torch": torch.__version__,
        "sigmas": list(entries[str(SHOWN)].sigmas),
        "lists": lists,
        "tables": tables,
        "trajectory": projected(plain, runs),
        "races": races,
    }
    OUT.write_text(json.dumps(rounded(record)) + "\n")


if __name__ == "__main__":
    main()
