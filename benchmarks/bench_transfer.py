"""One checkpoint in places it was not trained for: `python benchmarks/bench_transfer.py`.

Trains one forecaster on embedded FLUX (50 Euler steps, guidance 3.5, 64 x 64 pixels, 10 full steps)
and one on embedded SDXL, then changes one thing at a time: step count, number of full steps, noise
levels, sampler, resolution, guidance scale, a LoRA on the transformer. Each time lesa, reuse on
lesa's own list and training-free forecasters on their published lists, FORA among them, run the
same unseen prompts, against the plain run of that setting. benchmarks/results/transfer.json.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from _environment import RESULTS, environment, write

import lesa
from lesa.core.schedule import Schedule
from lesa.evaluation import Bench, build, compare
from lesa.evaluation.intervals import bootstrap, mean
from lesa.evaluation.peers.solvers import sampler
from lesa.testbed import load, prompts, settings

PEERS = ("taylor-1", "hicache", "fora")
TRAINED = 10  # full steps of 50


@dataclass(frozen=True)
class Place:
    """What differs from training: arguments of the call, and what is done to the pipeline."""

    name: str
    full_steps: int = TRAINED
    call: dict[str, Any] = field(default_factory=dict)
    changed: Callable[[Any], AbstractContextManager[Any]] = lambda pipe: nullcontext()


@contextmanager
def scheduler(pipe: Any, name: str, **config: Any) -> Iterator[None]:
    """Another scheduler of diffusers, or another configuration, as users set it."""
    own = pipe.scheduler
    pipe.scheduler = getattr(diffusers, name).from_config(own.config, **config)
    try:
        yield
    finally:
        pipe.scheduler = own


@contextmanager
def lora(pipe: Any, scale: float) -> Iterator[None]:
    """A random LoRA of rank 4 on all attention projections."""
    import peft

    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    pipe.transformer.add_adapter(config, "transfer")
    pipe.transformer.set_adapters("transfer", scale)
    try:
        yield
    finally:
        pipe.transformer.delete_adapters("transfer")


STEPS = (
    Place("as trained"),
    *(
        Place(f"{n} steps, {full} full", full, {"num_inference_steps": n})
        for n, full in ((12, 5), (20, 6), (28, 8), (28, 10), (40, 10), (100, 10))
    ),
    *(Place(f"{n} full steps of 50", n) for n in (13, 8, 6)),
)
FLOW, EULER = "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"
DPM = "DPMSolverMultistepScheduler"
PLACES = {
    "flux": (
        *STEPS,
        *(
            Place(
                f"shift {n:g}",
                changed=partial(scheduler, name=FLOW, use_dynamic_shifting=False, shift=n),
            )
            for n in (1.0, 6.0)
        ),
        Place("Karras levels", changed=partial(scheduler, name=FLOW, use_karras_sigmas=True)),
        Place(
            "30 own sigmas",
            call={"sigmas": [(1 - i / 30) ** 1.5 for i in range(30)], "num_inference_steps": 30},
        ),
        Place("DPM++ 2M", changed=partial(sampler, solver=DPM)),
        Place("UniPC", changed=partial(sampler, solver="UniPCMultistepScheduler")),
        Place("96 x 96 pixels", call={"height": 96, "width": 96}),
        Place("64 x 96 pixels", call={"height": 64, "width": 96}),
        *(Place(f"guidance {g}", call={"guidance_scale": g}) for g in (2.0, 5.0)),
        Place("LoRA, scale 0.5", changed=partial(lora, scale=0.5)),
    ),
    "sdxl": (
        *STEPS,
        Place("Karras levels", changed=partial(scheduler, name=EULER, use_karras_sigmas=True)),
        Place("DDIM", changed=partial(scheduler, name="DDIMScheduler", clip_sample=False)),
        Place("DPM++ 2M", changed=partial(scheduler, name=DPM)),
        Place("DPM++ 2M Karras", changed=partial(scheduler, name=DPM, use_karras_sigmas=True)),
        Place("UniPC", changed=partial(scheduler, name="UniPCMultistepScheduler")),
        Place(
            "Euler ancestral", changed=partial(scheduler, name="EulerAncestralDiscreteScheduler")
        ),
        Place("LCM", changed=partial(scheduler, name="LCMScheduler")),
        Place(
            "DDIM, eta 1",
            call={"eta": 1.0},
            changed=partial(scheduler, name="DDIMScheduler", clip_sample=False),
        ),
        *(Place(f"guidance {g}", call={"guidance_scale": g}) for g in (3.0, 8.0)),
    ),
}


def chosen_list(pipe: Any, forecaster: Any, place: Place, call: dict[str, Any]) -> Schedule:
    """The full steps that `lesa.enable` takes there, by one run of it."""
    with lesa.accelerate(pipe, forecaster, full_steps=place.full_steps):
        pipe("a picture", **call, output_type="latent")
        found = lesa.stats(pipe)
    assert found.skipped, f"{place.name}: nothing was skipped, {found.fallbacks}"
    return Schedule.explicit(found.full_steps, call["num_inference_steps"])


def measure(
    name: str, pipe: Any, forecaster: Any, place: Place, unseen: int, seed: int = 1000
) -> dict[str, Any]:
    """lesa, reuse on its list, and peers on their own lists in one place."""
    call = {**settings(name), **place.call}
    bench = Bench(call["num_inference_steps"], pipe, call, forecaster=forecaster)
    texts = prompts(name, unseen, seed=1, split="test")
    with place.changed(pipe), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lesa says that the runs are others: it is the point
        plan = chosen_list(pipe, forecaster, place, call)
        full = len(plan.full_steps)
        methods = [build(peer, place.full_steps, bench) for peer in PEERS]
        methods += [build(peer, full, bench, searched=plan) for peer in ("fora", "lesa")]
        found = compare(pipe, texts, methods, call, seed=seed, batch_size=8, keep_pictures=1)
    *peers, reuse, ours = found.rows
    best = max(peers, key=lambda row: row["psnr_mean"])
    gain = bootstrap(mean, torch.tensor(ours["psnr"]) - torch.tensor(best["psnr"]))
    over = bootstrap(mean, torch.tensor(ours["psnr"]) - torch.tensor(reuse["psnr"]))
    print(
        f"{name}: {place.name:22} lesa {ours['psnr_mean']:6.2f} {ours['psnr_p10']:6.2f}  "
        f"reuse {reuse['psnr_mean']:6.2f} {reuse['psnr_p10']:6.2f} ({over['value']:+.2f})  "
        f"{best['method']} @{best['full_steps']} {best['psnr_mean']:6.2f} ({gain['value']:+.2f}) "
        f"{plan.full_steps} {' '.join(found.notes)}",
        flush=True,
    )
    rows = [*peers, reuse, ours]
    told = {"gain": gain, "over_reuse": over, "rows": rows, "notes": found.notes}
    return {"place": f"{name}: {place.name}", **told}


def forecaster_of(name: str, pipe: Any, folder: Path | None) -> Any:
    """Trained on 16 prompts; kept in a folder, if one is given, and read from there again."""
    kept = None if folder is None else folder / name
    if kept is not None and kept.exists():
        return lesa.LesaForecaster.from_pretrained(kept)
    seen = prompts(name, 16, seed=0, split="train")
    trained = lesa.train(pipe, seen, 50, TRAINED, call=settings(name), progress=False)
    if kept is not None:
        trained.save_pretrained(kept)
    return trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", nargs="+", choices=tuple(PLACES), default=list(PLACES))
    parser.add_argument("--unseen", type=int, default=32, help="test prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forecasters", type=Path, help="folder to keep the trained ones in")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of transfer.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    places, lists = [], {}
    for name in options.pipelines:
        pipe = load(name)
        forecaster = forecaster_of(name, pipe, options.forecasters)
        lists[name] = forecaster.calibrated[0].full_steps
        places += [measure(name, pipe, forecaster, p, options.unseen) for p in PLACES[name]]
    report = {
        "environment": environment(),
        "trained": {"prompts": 16, "full_steps": lists[options.pipelines[0]], "lists": lists},
        "unseen_prompts": options.unseen,
        "places": places,
    }
    write(options.out / "transfer.json", report)


if __name__ == "__main__":
    main()
