"""Make the picture of README.md: `python benchmarks/make_picture.py` (four minutes, one CPU core).

The embedded SDXL at 5 of 50 full steps: plain, by lesa, by the best other method in
benchmarks/results/compare/sdxl.json, and with 5 plain steps, on the first 8 unseen prompts of that
file. The numbers next to the pictures are that file's, over all of its prompts; every picture made
here must have the PSNR that the file has for it. The PNG file holds the same words as text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _environment import ROOT
from _result_tables import best, read, title
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import lesa
from lesa.evaluation.compare import PLAIN, Comparison, compare
from lesa.evaluation.method import Bench
from lesa.evaluation.methods import build_all
from lesa.evaluation.ranking import OURS, Row
from lesa.testbed import load, prompts, settings

PIPELINE, FULL_STEPS, FEWER, SHOWN = "sdxl", 5, "fewer-steps", 8
MEASURED = ROOT / "benchmarks" / "results" / "compare" / f"{PIPELINE}.json"
OUT = ROOT / "docs" / "images" / "sdxl-5-of-50.png"
SCALE, MARGIN, INK = 2, 236, (32, 32, 32)
AGREE = 0.1  # dB between a picture made here and the measured one


def chosen(measured: dict[str, Any]) -> list[Row]:
    """The rows to show: lesa, the best mean of the others on their own steps, fewer steps."""
    rows = measured["rows"]
    mine, peer, fewer = (
        next(row for row in rows if row["label"] == f"{OURS} @{FULL_STEPS}"),
        best(rows, FULL_STEPS, "own", "psnr_mean"),
        next(row for row in rows if row["schedule"] == f"own: {FULL_STEPS} steps"),
    )
    if peer is None:
        raise SystemExit(f"no peer at {FULL_STEPS} full steps in {MEASURED}: run bench_compare.py")
    return [mine, peer, fewer]


def run(forecaster: Any, rows: list[Row], measured: dict[str, Any], shown: int) -> Comparison:
    """The pictures of the first prompts, each as far from the plain one as was measured."""
    pipe, call = load(PIPELINE), settings(PIPELINE)
    bench = Bench(call["num_inference_steps"], pipe, call, (), forecaster)
    methods = build_all([row["method"] for row in rows], [FULL_STEPS], bench)
    texts = measured["prompts"][:shown]
    result = compare(pipe, texts, methods, call, seed=measured["seed"], keep_pictures=shown)
    known = {row["label"]: row["psnr"] for row in rows}
    for row in result.rows:
        for found, psnr in zip(row["psnr"], known[row["label"]], strict=False):
            if abs(found - psnr) > AGREE:
                raise SystemExit(
                    f"{row['label']}: {found:.2f} dB, measured {psnr:.2f}: run bench_compare.py"
                )
    return result


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
            font = ImageFont.load_default(24 if line == 0 else 18)
            pen.text((8, row * height + 20 + 30 * line), text, INK, font)
    return page


def captions(rows: list[Row], measured: dict[str, Any]) -> dict[str, list[str]]:
    """Label -> name, steps and seconds, quality."""
    steps = measured["settings"]["num_inference_steps"]
    found = {PLAIN: ["plain", f"{steps} steps, {measured['plain']['seconds']:.2f} s"]}
    for row in rows:
        kind = "steps" if row["method"] == FEWER else "full steps"
        found[row["label"]] = [
            OURS if row["method"] == OURS else title(row),
            f"{row['full_steps']:.0f} {kind}, {row['seconds']:.2f} s",
            f"{row['psnr_mean']:.1f} dB, p10 {row['psnr_p10']:.1f} dB",
        ]
    return found


def save(page: Image.Image, labels: dict[str, list[str]], path: Path) -> None:
    """As PNG, with the words on it as text, from which a test tells a picture of older numbers."""
    words = PngInfo()
    words.add_text("Description", as_text(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, optimize=True, pnginfo=words)


def as_text(labels: dict[str, list[str]]) -> str:
    """A line per row."""
    return "\n".join(", ".join(lines) for lines in labels.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forecaster", help="folder of a trained one, instead of training")
    parser.add_argument("--out", type=Path, default=OUT, help="the PNG file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured, call = read(MEASURED), settings(PIPELINE)
    if options.forecaster:
        forecaster = lesa.LesaForecaster.from_pretrained(options.forecaster)
    else:
        seen = prompts(PIPELINE, measured["training"]["prompts"], seed=0, split="train")
        steps = call["num_inference_steps"]
        forecaster = lesa.train(load(PIPELINE), seen, steps, FULL_STEPS, call=call)
    rows = chosen(measured)
    labels = captions(rows, measured)
    result = run(forecaster, rows, measured, SHOWN)
    save(draw(result.pictures, labels), labels, options.out)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
