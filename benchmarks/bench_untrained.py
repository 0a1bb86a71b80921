"""lesa without training beside training-free peers: `python benchmarks/bench_untrained.py`.

On each embedded pipeline `lesa-untrained` runs unseen prompts with 13, 10 and 8 of 50 full steps:
in the shape that is shipped, and in the one that fit_prior.py chose on the three *other* pipelines.
The peers run on their own lists. Then, in the shipped shape, one thing differs at a time: noise
levels, sampler, number of steps, few-step students. Writes benchmarks/results/untrained.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from _environment import RESULTS, environment, write
from bench_transfer import PLACES, Place

import lesa
from lesa.evaluation import Bench, build
from lesa.evaluation.metrics import psnr
from lesa.evaluation.runs import generate
from lesa.forecasters.prior import Prior, Shape
from lesa.testbed import load, prompts, settings

PEERS = ("fora", "taylor-1", "hicache", "foca")
COUNTS = (13, 10, 8)
PIPELINES = {"flux": 1.0, "qwen": 0.75, "hunyuan": 0.5, "sdxl": 1.0}  # share of the prompts
ELSEWHERE = {
    "flux": ("28 steps, 8 full", "Karras levels", "DPM++ 2M"),
    "sdxl": ("Karras levels", "DPM++ 2M"),
}
OURS = {"lesa-untrained": Shape()}
FEW = {"schnell": (2, 1), "lightning": (4, 3, 2)}
SEED = 1000


class Scene:
    """A pipeline in one place, with the plain run of its unseen prompts."""

    def __init__(self, name: str, pipe: Any, place: Place, unseen: int) -> None:
        self.pipe, self.call = pipe, {**settings(name), **place.call}
        self.texts = prompts(name, unseen, seed=1, split="test")
        self.plain = self._pictures()
        self.bench = Bench(self.call["num_inference_steps"], pipe, self.call)

    def _pictures(self) -> torch.Tensor:
        seeds = range(SEED, SEED + len(self.texts))
        return generate(self.pipe, self.texts, seeds, self.call).images

    def row(self, method: str, count: int, prior: Prior | None = None) -> dict[str, Any]:
        """dB per prompt: of a peer on its own list, of the prior on the list that it makes."""
        if prior is None:
            made = build(method, count, self.bench)
            options: dict[str, Any] = {"forecaster": made.forecaster, "schedule": made.schedule}
        else:
            options = {"forecaster": prior, "full_steps": count}
        with lesa.accelerate(self.pipe, **options):
            found = psnr(self.plain, self._pictures()).tolist()
            full = lesa.stats(self.pipe).full_steps
        return {"method": method, "wanted": count, "full_steps": full, "psnr": found}


def rows(at: Scene, count: int, shapes: Mapping[str, Shape]) -> Iterator[dict[str, Any]]:
    yield from (at.row(peer, count) for peer in PEERS)
    yield from (at.row(name, count, Prior(shape)) for name, shape in shapes.items())


def measured(name: str, label: str, at: Scene, count: int, shapes: Mapping[str, Shape]) -> Any:
    found = list(rows(at, count, shapes))
    for row in found:
        values = torch.tensor(row["psnr"])
        print(
            f"{name}, {label}, {count}: {row['method']:15} {len(row['full_steps'])} full "
            f"{values.mean():6.2f} {values.quantile(0.1):6.2f} {values.min():6.2f}",
            flush=True,
        )
    return {"pipeline": name, "place": label, "count": count, "rows": found}


def of_pipeline(name: str, unseen: int) -> Iterator[dict[str, Any]]:
    """Its counts, then its other places."""
    pipe = load(name)
    if name in FEW:
        at = Scene(name, pipe, Place("few steps"), unseen)
        label = f"{settings(name)['num_inference_steps']} steps"
        yield from (measured(name, label, at, count, OURS) for count in FEW[name])
        return
    other = Shape(**json.loads((RESULTS / "prior.json").read_text())["left_out"][name]["shape"])
    shapes = OURS | ({} if other == Shape() else {"left out": other})
    at = Scene(name, pipe, Place("50 steps"), round(PIPELINES[name] * unseen))
    yield from (measured(name, "50 steps", at, count, shapes) for count in COUNTS)
    for place in PLACES.get(name, ()):
        if place.name in ELSEWHERE[name]:
            with place.changed(pipe):
                at = Scene(name, pipe, place, unseen // 2)
                yield measured(name, place.name, at, place.full_steps, OURS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = (*PIPELINES, *FEW)
    parser.add_argument("--pipelines", nargs="+", choices=known, default=known)
    parser.add_argument("--unseen", type=int, default=12, help="test prompts; fewer in long runs")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = RESULTS / "untrained.json"
    for name in options.pipelines:
        kept = json.loads(path.read_text())["places"] if path.exists() else []
        found = [place for place in kept if place["pipeline"] != name]
        found += of_pipeline(name, options.unseen)
        found.sort(key=lambda place: known.index(place["pipeline"]))
        write(
            path,
            {"environment": environment(), "unseen_prompts": options.unseen, "places": found},
        )


if __name__ == "__main__":
    main()
