"""One checkpoint in places it was not trained for: `python benchmarks/bench_transfer.py`.

Trains one forecaster on the embedded FLUX pipeline (50 Euler steps, guidance 3.5, 64 x 64 pixels,
10 full steps), then changes one thing at a time: step count, number of full steps, resolution,
guidance scale, sampler, a LoRA on the transformer. Each time lesa and training-free forecasters run
the same unseen prompts with as many full steps, against the plain run of that setting.
benchmarks/results/transfer.json.
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

import torch
from _environment import RESULTS, environment, write

import lesa
from lesa.evaluation import Bench, build, compare
from lesa.evaluation.intervals import bootstrap, mean
from lesa.evaluation.peers.solvers import sampler
from lesa.testbed import load, prompts, settings

PEERS = ("taylor-1", "hicache", "spectrum")
TRAINED = 10  # full steps of 50


@dataclass(frozen=True)
class Place:
    """What differs from training: arguments of the call, and what is done to the pipeline."""

    name: str
    full_steps: int = TRAINED
    call: dict[str, Any] = field(default_factory=dict)
    changed: Callable[[Any], AbstractContextManager[Any]] = lambda pipe: nullcontext()


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


PLACES = (
    Place("as trained"),
    *(Place(f"{n} steps", round(n / 5), {"num_inference_steps": n}) for n in (20, 28, 40, 100)),
    *(Place(f"{n} full steps of 50", n) for n in (13, 8, 6)),
    *(Place(f"{n} x {n} pixels", call={"height": n, "width": n}) for n in (48, 96)),
    Place("64 x 96 pixels", call={"height": 64, "width": 96}),
    *(Place(f"guidance {g}", call={"guidance_scale": g}) for g in (2.0, 5.0)),
    Place("DPM++ 2M", changed=partial(sampler, solver="DPMSolverMultistepScheduler")),
    Place("UniPC", changed=partial(sampler, solver="UniPCMultistepScheduler")),
    Place("LoRA, scale 0.5", changed=partial(lora, scale=0.5)),
)


def measure(pipe: Any, forecaster: Any, place: Place, unseen: int) -> dict[str, Any]:
    """lesa and its peers in one place."""
    call = {**settings("flux"), **place.call}
    bench = Bench(call["num_inference_steps"], pipe, call, forecaster=forecaster)
    texts = prompts("flux", unseen, seed=1, split="test")
    with place.changed(pipe), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lesa says that the weights are others: it is the point
        methods = [build(name, place.full_steps, bench) for name in (*PEERS, "lesa")]
        found = compare(pipe, texts, methods, call, seed=1000, batch_size=8, keep_pictures=1)
    ours, peers = found.rows[-1], found.rows[:-1]
    best = max(peers, key=lambda row: row["psnr_mean"])
    gain = bootstrap(mean, torch.tensor(ours["psnr"]) - torch.tensor(best["psnr"]))
    print(
        f"{place.name:22} lesa {ours['psnr_mean']:6.2f} {ours['psnr_p10']:6.2f}  "
        f"{best['method']} @{best['full_steps']} {best['psnr_mean']:6.2f} {best['psnr_p10']:6.2f}  "
        f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] {' '.join(found.notes)}",
        flush=True,
    )
    return {"place": place.name, "gain": gain, "rows": found.rows, "notes": found.notes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unseen", type=int, default=32, help="test prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of transfer.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, call = load("flux"), settings("flux")
    seen = prompts("flux", 16, seed=0, split="train")
    forecaster = lesa.train(pipe, seen, 50, TRAINED, call=call, progress=False)
    report = {
        "environment": environment(),
        "trained": {"prompts": len(seen), "full_steps": forecaster.calibrated[0].full_steps},
        "unseen_prompts": options.unseen,
        "places": [measure(pipe, forecaster, place, options.unseen) for place in PLACES],
    }
    write(options.out / "transfer.json", report)


if __name__ == "__main__":
    main()
