"""The main job in one go: train on a few prompts, skip most steps of unseen ones, show both."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

FULL_STEPS = (10, 8)
UNSEEN = 16
PEERS = ("fewer-steps", "taylorseer-1", "lesa")


def run_demo(pipeline: str, out: Path, prompts_count: int, console: Console) -> dict[str, Any]:
    """Write the report of a fresh forecaster into `out`, print what was gained, return the facts.

    Trains on `prompts_count` captions of the embedded pipeline, then generates unseen captions
    plain and accelerated at 10 and at 8 full steps of 50.

    Raises: LesaError for an unknown pipeline or an unwritable folder.
    """
    import lesa
    from lesa.evaluation.compare import compare
    from lesa.evaluation.methods import build_all
    from lesa.evaluation.report import rich_table, write_report
    from lesa.inputs import quieten
    from lesa.terminal import progress

    quieten()
    begun = time.perf_counter()
    pipe, settings = lesa.testbed.load(pipeline), lesa.testbed.settings(pipeline)
    steps = settings["num_inference_steps"]
    console.print(f"Training a forecaster on {prompts_count} prompts, {steps} steps each.")
    forecaster = lesa.train(
        pipe,
        lesa.testbed.captions(prompts_count, seed=0, split="train"),
        num_inference_steps=steps,
        full_steps=FULL_STEPS,
        call=settings,
    )
    forecaster.save_pretrained(out / "forecaster")
    trained = time.perf_counter() - begun

    unseen = lesa.testbed.captions(UNSEEN, seed=1, split="test")
    methods = build_all(PEERS, FULL_STEPS, steps, forecaster=forecaster)
    console.print(f"Generating {UNSEEN} unseen prompts, plain and accelerated.")
    batch = UNSEEN // 2
    with progress("compare", 2 * (len(methods) + 1)) as advance:
        result = compare(
            pipe, unseen, methods, settings, seed=1000, batch_size=batch, advance=advance
        )
    seconds = {"train_seconds": trained, "demo_seconds": time.perf_counter() - begun}
    files = write_report(
        result, out, title="lesa demo", shown=("taylorseer-1", "lesa"), extra=seconds
    )
    console.print(f"Pictures and curves: {files['report.html']}")
    console.print(rich_table(result.rows, result.plain_seconds, steps), *result.notes, sep="\n")
    return {**result.to_dict(), **seconds, "files": list(files.values())}
