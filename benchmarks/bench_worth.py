"""What training says of a list, against unseen prompts: `python benchmarks/bench_worth.py`.

Each embedded pipeline is trained on 16 prompts for 13, 10, 8 and 6 of 50 steps in full, by default.
Of every list: PSNR in dB, mean, p10 and minimum, as stored (of up to 16 prompts, fitted ones among
them), of the four alone that were held out, and of 64 unseen prompts.
benchmarks/results/worth.json.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from _environment import environment, write
from bench_guard import arguments, generate, summary

import lesa
from lesa.testbed import load, prompts, settings
from lesa.util.perceptual import psnr

COUNTS, HELD_OUT = (13, 10, 8, 6), [3, 7, 11, 15]


def measure(name: str, unseen: int) -> list[dict[str, Any]]:
    """A row per list."""
    pipe, call = load(name), settings(name)
    pipe.set_progress_bar_config(disable=True)
    seen, texts = prompts(name, 16, seed=0, split="train"), prompts(name, unseen, 1, split="test")
    own = {key: value for key, value in call.items() if key != "num_inference_steps"}
    forecaster = lesa.train(pipe, seen, 50, COUNTS, call=own, progress=False)
    judged = {
        "held": [(seen[i], i) for i in HELD_OUT],
        "unseen": [(text, 1000 + i) for i, text in enumerate(texts)],
    }
    plain = {kind: _pictures(pipe, call, some) for kind, some in judged.items()}
    rows = []
    for entry in forecaster.calibrations:
        with lesa.accelerate(pipe, forecaster, schedule=entry.schedule):
            found = {
                kind: summary(psnr(plain[kind], _pictures(pipe, call, some)))
                for kind, some in judged.items()
            }
        stored = {key: getattr(entry.worth, key) for key in ("mean", "p10", "minimum", "pictures")}
        rows.append({"pipeline": name, "full_steps": entry.schedule.full_steps, "stored": stored})
        rows[-1] |= found
        print(rows[-1], flush=True)
    return rows


def _pictures(pipe: Any, call: dict[str, Any], some: list[tuple[str, int]]) -> torch.Tensor:
    """Of prompts with their seeds, one at a time."""
    return torch.cat([generate(pipe, call, [text], seed)[0] for text, seed in some])


def main() -> None:
    options = arguments(__doc__, "worth.json")
    rows = [row for name in options.pipelines for row in measure(name, options.unseen)]
    away = {
        f"{who} {key}": fmean(abs(row[who][key] - row["unseen"][key]) for row in rows)
        for who in ("stored", "held")
        for key in ("mean", "p10", "minimum")
    }
    print(away)
    report = {"environment": environment(), "unseen_prompts": options.unseen, "away": away}
    write(options.out / "worth.json", report | {"rows": rows})


if __name__ == "__main__":
    main()
