"""Make the picture of README.md: `python benchmarks/make_picture.py` (six minutes on one CPU core).

The embedded SDXL at 5 of 50 full steps: plain, by lesa, by the best other method in
benchmarks/results/compare/sdxl.json, and with 5 plain steps. A forecaster is trained on 16 prompts,
64 unseen prompts are measured, and the first 8 of them are shown. Writes
docs/images/sdxl-5-of-50.png and, with all that was measured, benchmarks/results/picture.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from _environment import ROOT, environment, write
from _result_tables import best, read, title
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import lesa
from lesa.evaluation.compare import PLAIN, Comparison, compare
from lesa.evaluation.method import Bench
from lesa.evaluation.methods import build_all
from lesa.evaluation.ranking import OURS, Row
from lesa.testbed import load, prompts, settings

RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
PIPELINE, FULL_STEPS, FEWER = "sdxl", 5, "fewer-steps"
SEED, SCALE, MARGIN, INK = 1000, 2, 180, (32, 32, 32)


def peer() -> str:
    """The method with the best mean on its own full steps, of all that were compared."""
    rows = read(RESULTS / "compare" / f"{PIPELINE}.json")["rows"]
    found = best(rows, FULL_STEPS, "own", "psnr_mean")
    if found is None:
        raise SystemExit(f"no peer at {FULL_STEPS} full steps: run bench_compare.py first")
    return str(found["method"])


def measure(forecaster: Any, names: list[str], unseen: int, shown: int) -> Comparison:
    """The methods on unseen prompts; the first `shown` pictures are kept."""
    pipe, call = load(PIPELINE), settings(PIPELINE)
    bench = Bench(call["num_inference_steps"], pipe, call, (), forecaster)
    texts = prompts(PIPELINE, unseen, seed=1, split="test")
    methods = build_all(names, [FULL_STEPS], bench)
    return compare(pipe, texts, methods, call, seed=SEED, keep_pictures=shown)


def draw(pictures: dict[str, Tensor], labels: dict[str, list[str]]) -> Image.Image:
    """A row per label, its lines at the left; `pictures` are [n, 3, H, W] in [0, 1]."""
    strips = [torch.cat(list(pictures[label]), -1) for label in labels]
    grid = torch.cat(strips, -2).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    tiles = Image.fromarray(grid.numpy())
    tiles = tiles.resize((SCALE * tiles.width, SCALE * tiles.height), Image.Resampling.NEAREST)
    page = Image.new("RGB", (MARGIN + tiles.width, tiles.height), "white")
    page.paste(tiles, (MARGIN, 0))
    pen, height = ImageDraw.Draw(page), tiles.height // len(labels)
    for row, lines in enumerate(labels.values()):
        for line, text in enumerate(lines):
            font = ImageFont.load_default(18 if line == 0 else 14)
            pen.text((8, row * height + 26 + 26 * line), text, INK, font)
    return page


def captions(result: Comparison) -> dict[str, list[str]]:
    """Label -> name, full steps and seconds, quality."""
    rows = {row["label"]: row for row in result.rows}
    order = sorted(rows, key=lambda label: -rows[label]["psnr_mean"])
    plain = ["plain", f"{result.settings['num_inference_steps']} steps"]
    plain.append(f"{result.plain_seconds:.2f} s")
    return {PLAIN: plain, **{label: _caption(rows[label]) for label in order}}


def _caption(row: Row) -> list[str]:
    fewer = row["method"] == FEWER
    name = OURS if row["method"] == OURS else title(row)
    steps = f"{row['full_steps']:.0f} {'steps' if fewer else 'full steps'}"
    quality = f"{row['psnr_mean']:.1f} dB, p10 {row['psnr_p10']:.1f}"
    return [name, f"{steps}, {row['seconds']:.2f} s", quality]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forecaster", help="folder of a trained one, instead of training")
    parser.add_argument("--unseen", type=int, default=64, help="prompts that are measured")
    parser.add_argument("--shown", type=int, default=8, help="prompts that are shown")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the picture")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of picture.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, call = environment(), settings(PIPELINE)
    if options.forecaster:
        forecaster = lesa.LesaForecaster.from_pretrained(options.forecaster)
    else:
        seen = prompts(PIPELINE, 16, seed=0, split="train")
        steps = call["num_inference_steps"]
        forecaster = lesa.train(load(PIPELINE), seen, steps, FULL_STEPS, call=call)
    names = [OURS, peer(), FEWER]
    result = measure(forecaster, names, options.unseen, options.shown)
    options.images.mkdir(parents=True, exist_ok=True)
    path = options.images / f"{PIPELINE}-{FULL_STEPS}-of-{call['num_inference_steps']}.png"
    draw(result.pictures, captions(result)).save(path, optimize=True)
    facts = {"environment": begun, "picture": path.name, "shown": options.shown}
    write(options.out / "picture.json", result.to_dict() | facts)
    print(f"{path}: {path.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
