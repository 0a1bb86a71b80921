"""The main job in one go: train on a few prompts, skip most steps of unseen ones, show both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lesa.cli.output import say
from lesa.util.progress import Progress

if TYPE_CHECKING:
    from lesa.evaluation.comparison import Comparison
    from lesa.evaluation.method import Bench

UNSEEN = 16
FULL_STEPS = {50: (10, 8), 8: (5, 4, 2), 4: (2, 1)}  # by steps of the sampler, as in the paper
UNET_FULL_STEPS = (17, 10, 5)  # DeepCache at intervals 3, 5 and 10 of 50 steps
FEW = 8  # steps up to which no published schedule of TaylorSeer leaves much to skip


def contest(pipe: Any, num_steps: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Numbers of full steps to compare at, and the methods that apply to this pipeline."""
    if getattr(pipe, "unet", None) is not None and num_steps == 50:
        return UNET_FULL_STEPS, ("fewer-steps", "fora", "taylor-1", "deepcache", "lesa")
    counts = FULL_STEPS.get(num_steps, (max(1, num_steps // 5),))
    if num_steps <= FEW:
        return counts, ("fewer-steps", "fora", "taylor-1", "lesa")
    return counts, ("fewer-steps", "fora", "taylor-1", "foca", "lesa")


def run_demo(pipeline: str, out: Path, prompts_count: int, console: Console) -> dict[str, Any]:
    """Write the report of a fresh forecaster into `out`, print what was gained, return the facts.

    Trains on `prompts_count` captions of the embedded pipeline, then generates unseen captions
    plain and accelerated at the numbers of full steps that the paper reports for its step count.

    Raises: LesaError for an unknown pipeline or an unwritable folder.
    """
    from lesa import testbed

    begun = time.perf_counter()
    with Progress().bar("load", 0):
        from lesa.cli.inputs import quieten
        from lesa.evaluation.method import Bench
        from lesa.evaluation.methods import left_out

        quieten()
        pipe, settings = testbed.load(pipeline), testbed.settings(pipeline)
    steps = settings["num_inference_steps"]
    counts, names = contest(pipe, steps)
    bench = Bench(steps, pipe, settings)
    missing = left_out([name for name in names if name != "lesa"], bench)
    names = tuple(name for name in names if name not in missing)
    for reason in missing.values():
        say(console, reason)
    console.print(f"Training a forecaster on {prompts_count} prompts, {steps} steps each.")
    seen = testbed.prompts(pipeline, prompts_count, seed=0, split="train")
    forecaster = _train(bench, seen, counts, out)
    trained = time.perf_counter() - begun
    console.print(f"Generating {UNSEEN} unseen prompts, plain and accelerated.")
    unseen = testbed.prompts(pipeline, UNSEEN, seed=1)
    result = _measure(replace(bench, forecaster=forecaster), unseen, names, counts)
    seconds = {"train_seconds": trained, "demo_seconds": time.perf_counter() - begun}
    facts = {**seconds, "attributes": result.scores()}
    files = _report(result, out, f"lesa demo: {pipeline}", facts, console)
    return {**result.to_dict(), **facts, "files": list(files.values())}


def _train(bench: Bench, prompts: Sequence[str], counts: Sequence[int], out: Path) -> Any:
    """A forecaster for the numbers of full steps, saved in a folder of the report."""
    import lesa
    from lesa.cli.run_train import end_if_interrupted

    forecaster = lesa.train(
        bench.pipe,
        prompts,
        num_inference_steps=bench.num_steps,
        full_steps=counts,
        call=bench.settings,
    )
    forecaster.save_pretrained(out / "forecaster")
    end_if_interrupted(forecaster)
    return forecaster


def _measure(
    bench: Bench, prompts: Sequence[str], names: Sequence[str], counts: Sequence[int]
) -> Comparison:
    """The methods against the plain run, in two batches."""
    from lesa.evaluation.compare import compare
    from lesa.evaluation.judges import attributes
    from lesa.evaluation.methods import build_all

    methods = build_all(names, counts, bench)
    return compare(
        bench.pipe,
        prompts,
        methods,
        bench.settings,
        seed=1000,
        batch_size=len(prompts) // 2,
        keep_pictures=len(prompts),
        judges=[attributes],
        progress=Progress(),
    )


def _report(
    result: Comparison, out: Path, title: str, facts: dict[str, Any], console: Console
) -> dict[str, Path]:
    """Write the report and print the table."""
    from lesa.evaluation.report import rich_table, write_report

    with Progress().bar("report", 0):
        files = write_report(result, out, title=title, extra=facts)
    say(console, f"Pictures and curves: {files['report.html']}")
    for label, shares in result.scores().items():
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        say(console, f"{label}: {listed} as in the captions")
    for note in result.notes:
        say(console, note)
    console.print(
        rich_table(result.rows, result.plain_seconds, result.settings["num_inference_steps"])
    )
    return files
