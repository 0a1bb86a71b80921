"""Every method on the embedded pipelines: `python benchmarks/bench_compare.py --pipelines flux`.

Trains one forecaster per pipeline on 16 prompts at 13, 10, 8 and 6 full steps (few-step pipelines:
the paper's counts; a U-Net also those of DeepCache), then runs all peers that can run there, each
on its own published schedule and on the list that was searched for lesa, on the same unseen prompts
and seeds; on a U-Net also lesa with a second forecaster for the hidden tap (`lesa-hidden`). Writes
benchmarks/results/compare/<pipeline>.json, and with `--report FOLDER` also the HTML report. With
`--methods lesa,foca` rows of other methods stay in the file where they ran on the same prompts and
weights. With `--methods foca,fora`, without lesa, nothing is trained: these rows, on their own
lists, are put beside those of the file, which stay. `--unseen 128 --folder tails` measures 10th
percentiles and minima on more prompts, in a file of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from _environment import RESULTS, environment, write
from _result_tables import with_canonical_names
from rich.console import Console

import lesa
from lesa.cli.run_compare import left_out, prepare
from lesa.cli.run_demo import FULL_STEPS, UNET_FULL_STEPS
from lesa.evaluation.compare import PLAIN, Comparison, compare
from lesa.evaluation.failures import Failures
from lesa.evaluation.judges import attributes
from lesa.evaluation.method import Bench, Method
from lesa.evaluation.methods import parse
from lesa.evaluation.ranking import OTHER_TAP, OURS, origin, ours
from lesa.evaluation.report import rich_table, write_report
from lesa.testbed import PIPELINES, load, prompts, settings
from lesa.training.job import weights_hash
from lesa.util.progress import Progress

COUNTS = FULL_STEPS | {50: (13, 10, 8, 6)}  # by steps of the sampler
CALIBRATION = 16


def full_steps(pipe: Any, steps: int) -> tuple[int, ...]:
    """The numbers of full steps that are measured, most first."""
    unet = UNET_FULL_STEPS if hasattr(pipe, "unet") else ()
    return tuple(sorted({*COUNTS[steps], *unet}, reverse=True))


def hidden(pipe: Any, seen: list[str], count: int, call: dict[str, Any]) -> Method:
    """lesa on the hidden tap, a method of its own name."""
    steps = call["num_inference_steps"]
    forecaster = lesa.train(pipe, seen, steps, [count], tap="hidden", call=call, progress=False)
    full = forecaster.schedule_for(count, steps)
    return Method(OTHER_TAP, steps, forecaster, full, "searched")


def measure(
    name: str, methods: str, unseen: int, batch_size: int
) -> tuple[Comparison, dict[str, Any]]:
    """The comparison, and what else is known of it: the pipeline's weights and the training."""
    pipe, call = load(name), settings(name)
    steps = call["num_inference_steps"]
    counts, log, started = full_steps(pipe, steps), Progress(quiet=True), time.perf_counter()
    seen = prompts(name, CALIBRATION, seed=0, split="train")
    peers = [method for method in methods.split(",") if method != OURS]
    parse(peers or "all", Bench(steps, pipe, call, seen))  # before the long training
    facts: dict[str, Any] = {"weights": hashes(pipe)}
    forecaster = None
    if trains(methods):
        forecaster = lesa.train(pipe, seen, steps, counts, call=call, progress=log)
        seconds = time.perf_counter() - started
        facts["training"] = {"prompts": CALIBRATION, "seconds": seconds, "log": log.lines}
        print(f"{name}: trained in {seconds:.0f} s", flush=True)
    bench = Bench(steps, pipe, call, seen, forecaster)
    failures = Failures()
    contenders = prepare(methods, counts, bench, searched=True, failures=failures)
    if forecaster is not None and hasattr(pipe, "unet"):
        contenders.append(hidden(pipe, seen, counts[-1], call))
    print(f"{name}: {len(contenders)} rows prepared", flush=True)
    texts = prompts(name, unseen, seed=1, split="test")
    options = dict(seed=1000, batch_size=batch_size)
    result = compare(pipe, texts, contenders, call, progress=Progress(), **options)
    result.notes += failures.notes()
    mine = [method for method in contenders if method.name == OURS]
    if not mine:
        return result, facts
    judged = compare(pipe, texts, mine, call, judges=[attributes], **options)  # it is slow
    result.plain_more |= judged.plain_more
    scores = {row["label"]: row["scores"] for row in judged.rows}
    for row in result.rows:
        row |= {"scores": scores[row["label"]]} if row["label"] in scores else {}
    result.notes += left_out(methods, bench)
    return result, facts


def trains(methods: str) -> bool:
    """Is lesa among the methods?"""
    return methods == "all" or OURS in methods.split(",")


def hashes(pipe: Any) -> dict[str, str]:
    """A hash of the weights of each component that has some."""
    parts = sorted(pipe.components.items())
    return {name: weights_hash(part) for name, part in parts if isinstance(part, torch.nn.Module)}


def shares(result: Comparison) -> dict[str, dict[str, float]]:
    """What the checker found in the plain run's and lesa's pictures."""
    found = result.scores()
    mine = {row["label"]: found[row["label"]] for row in ours(result.rows)}
    return {"plain run": found[PLAIN], **mine}


def kept(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What was found, and of an earlier file the rows of methods that did not run this time.

    Rows on step lists that are no longer lesa's are dropped. Every kept row carries the `commit`
    that it was measured at; a row without one was measured at that of the file's environment.
    """
    if not alike(known, found):
        return found
    known = renamed(known)
    new = {row["label"] for row in found["rows"]}
    lists = {row["schedule"] for row in ours(found["rows"])}
    at = known["environment"]["commit"]
    old = [
        {**row, "commit": row.get("commit", at)}
        for row in known["rows"]
        if row["label"] not in new
        and row["method"] != OURS
        and (origin(row) == "own" or row["schedule"].split(";")[0] in lists)  # a note follows
    ]
    labels = {row["label"] for row in old}
    curves = {k: v for k, v in known["error_per_step"].items() if k in labels}
    counts = Counter(row["commit"] for row in old)
    notes = [
        f"{count} rows of other methods are kept from commit {at}." for at, count in counts.items()
    ]
    return found | {
        "rows": [*old, *found["rows"]],
        "error_per_step": {**curves, **found["error_per_step"]},
        "notes": [*found["notes"], *notes],
    }


def alike(known: dict[str, Any], found: dict[str, Any]) -> bool:
    """Did an earlier file's rows run the same prompts and seeds on the same weights?"""
    same = ("prompts", "seed", "settings", "weights")
    return all(known.get(key) == found[key] for key in same)


def added(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """An earlier file, with rows of other methods than lesa put in, each with its `commit`."""
    known, at = renamed(known), found["environment"]["commit"]
    rows = [{**row, "commit": at} for row in found["rows"]]
    labels = {row["label"] for row in rows}
    old = [row for row in known["rows"] if row["label"] not in labels]
    curves = {k: v for k, v in known["error_per_step"].items() if k not in labels}
    told = f"{len(rows)} rows of other methods were put in at commit {at}."
    return known | {
        "rows": [*old, *rows],
        "error_per_step": {**curves, **found["error_per_step"]},
        "notes": [*known["notes"], *found["notes"], told],
    }


def renamed(report: dict[str, Any]) -> dict[str, Any]:
    """A file in which methods have the names of today."""
    return json.loads(with_canonical_names(json.dumps(report)))


def rounded(value: Any) -> Any:
    """The same with six significant digits, so that the files stay small."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", default=",".join(PIPELINES), help="a comma list")
    parser.add_argument("--methods", default="all", help="all, or a comma list")
    parser.add_argument("--unseen", type=int, default=64, help="test prompts")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path, help="folder; a subfolder for every pipeline")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of --folder")
    parser.add_argument("--folder", default="compare", help="tails: of runs on more prompts")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.pipelines.split(","):
        begun = environment()  # its commit is what runs
        result, facts = measure(name, options.methods, options.unseen, options.batch_size)
        steps = result.settings["num_inference_steps"]
        Console().print(rich_table(result.rows, result.plain_seconds, steps))
        if options.report:
            write_report(result, options.report / name, title=f"lesa compare: {name}")
        facts |= {"environment": begun}
        if trains(options.methods):
            facts |= {"attributes": shares(result)}
        found = rounded(result.to_dict() | facts)
        path = options.out / options.folder / f"{name}.json"
        known = json.loads(path.read_text()) if path.exists() else None
        if trains(options.methods):
            write(path, found if known is None else kept(known, found))
        elif known is not None and alike(known, found):
            write(path, added(known, found))
        else:
            sys.exit(
                f"--methods {options.methods}: {path} holds no rows of lesa's on these "
                "prompts and weights; add lesa to the methods"
            )


if __name__ == "__main__":
    main()
