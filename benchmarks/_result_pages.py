"""The pages under docs/results/, each from its JSON file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from _result_tables import (
    LISTS,
    against,
    attributes,
    every,
    label,
    limits,
    provenance,
    shortfalls,
    shown,
    table,
)

from lesa.evaluation.ranking import OTHER_FORM, Row, decibels, ours

MADE = "*Made by `python benchmarks/make_results.py`; do not edit.*"  # ends every page
PEERS = [text for where in LISTS.values() for text in (f"best peer, {where}", "lesa better by")]
ALL = ("method", "full steps", "mean", "p10", "minimum", "SSIM", "seconds", "TFLOP")


def pipeline_page(
    name: str, part: dict[str, Any], main: dict[str, Any], tail: dict[str, Any] | None = None
) -> Iterator[str]:
    """The comparisons of one pipeline, `tail` on more prompts; that of flux with fewer steps is in
    `main_job.json`."""
    steps = part["settings"]["num_inference_steps"]
    yield f"# {name}\n\nHow to read it: [results](../results.md).\n"
    yield from section(f"{steps} steps (`compare/{name}.json`)", part)
    if tail is not None:
        count = len(tail["prompts"])
        yield from section(f"{count} unseen prompts, few methods (`tails/{name}.json`)", tail)
    if name == "flux":
        shared = {key: main[key] for key in ("environment", "training")}
        yield from section("28 steps (`main_job.json`)", shared | main["28 steps"])


def section(heading: str, part: dict[str, Any]) -> Iterator[str]:
    """One comparison: where it ran, lesa against the best peers, what fell short, all rows."""
    rows = part["rows"]
    yield f"## {heading}\n"
    yield provenance(part) + "\n"
    yield from table(("full steps", "", "lesa, dB", *PEERS), against(rows))
    short = list(shortfalls(rows))
    yield "\nFell short:\n" if short else "\nNo target was missed.\n"
    yield from short
    yield from limits(rows)
    yield from _with_network(rows)
    yield from attributes(part)
    yield "\n<details><summary>All rows</summary>\n"
    yield from table((*ALL, "full steps are"), every(rows))
    yield "\n</details>\n"
    yield from (f"{note}\n" for note in part.get("notes", ()))


def _with_network(rows: Sequence[Row]) -> Iterator[str]:
    """The same table of the form "disca", where it ran."""
    if ours(rows, OTHER_FORM):
        yield '\nWith a network on skipped steps, `form="disca"`, on the list that it chose:\n'
        head = ("full steps", "", f"{OTHER_FORM}, dB", *PEERS)
        yield from table(head, against(rows, OTHER_FORM))


def speed_page(main: dict[str, Any], loops: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The denoising loop, plain and accelerated: on GPUs, then of embedded FLUX on a CPU."""
    yield "# Speed\n"
    yield (
        "The ideal is S / |A|: steps over full steps. Weights are random where the table says so:"
        " time depends on neither weights nor coefficients.\n"
    )
    for file, report in loops.items():
        yield f"## {report['environment']['device']['name']} (`{file}`)\n"
        yield provenance(report) + "\n"
        for model in report["models"]:
            yield from _loop(model)
    yield "## Embedded FLUX on a CPU (`main_job.json`)\n"
    yield provenance(main) + "\n"
    head = ("full steps of 50", "pictures at once", "faster", "share of the ideal")
    yield from table(head, (_cpu(row) for row in main["loop"]))
    yield ""


def _loop(model: dict[str, Any]) -> Iterator[str]:
    call = ", ".join(f"{key} {value}" for key, value in model["call"].items())
    blocks = ", ".join(f"{key} {a} of {b}" for key, (a, b) in model["blocks"].items())
    size = "the whole model" if model["full_size"] else f"a part of the blocks ({blocks})"
    yield f"### {model['model']}, {size}\n"
    yield (
        f"{model['steps']} steps, {call}, {model['dtype']}, {model['weights']} weights;"
        f" commit {model['commit']}.\n"
    )
    head = ("run", "full steps", "seconds", "faster", "share of the ideal", "ring, MB", "peak, GB")
    yield from table(head, (_timed(row) for row in model["rows"]))
    yield from (f"\n{run} was not timed: {why}." for run, why in model["failures"].items())
    yield ""


def _timed(row: dict[str, Any]) -> list[str]:
    return [
        row["variant"],
        f"{row['full_steps']}",
        f"{row['seconds']['median']:.3f}",
        f"{row['speedup']['median']:.2f}x",
        f"{100 * row['share_of_ideal']:.1f} %",
        f"{row['ring_bytes'] / 1e6:.1f}" if "ring_bytes" in row else "",
        f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") else "",
    ]


def _cpu(row: dict[str, Any]) -> list[str]:
    share = f"{100 * row['share_of_ideal']:.1f} %"
    return [f"{row['full_steps']}", f"{row['batch']}", f"{row['speedup']:.2f}x", share]


def ablation_page(report: dict[str, Any]) -> Iterator[str]:
    """A section per pipeline: every variant against the reference, in dB of the final latent."""
    yield "# Ablations\n"
    for pipeline, part in report.items():
        yield f"## {pipeline} (`ablations.json`)\n"
        yield provenance(part) + "\n"
        yield (
            f"In dB of the final latent over {part['unseen_prompts']} unseen prompts, trained on"
            f" {part['calibration_prompts']}, held-out ones among them; the difference is paired by"
            " prompt. The cost of training is in plain generations of a prompt, all in all.\n"
        )
        head = ("full steps", "variant", "mean", "p10", "minimum", "difference", "from", "cost")
        yield from table(head, (_ablation(row) for row in part["rows"]))
        yield ""


def _ablation(row: dict[str, Any]) -> list[str]:
    change = row["difference"]
    return [
        f"{row['full_steps']}",
        row["variant"],
        *(f"{row[key]:.2f}" for key in ("mean", "p10", "min")),
        f"{change['value']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})",
        row.get("against", ""),
        "" if row.get("generations") is None else f"{row['generations']:.0f}",
    ]


def transfer_page(report: dict[str, Any]) -> Iterator[str]:
    """One checkpoint elsewhere: lesa and the best of a few peers in each place."""
    full = ", ".join(map(str, report["trained"]["full_steps"]))
    yield "# One checkpoint in other places\n"
    yield provenance(report) + " From `transfer.json`.\n"
    yield (
        f"Trained on {report['trained']['prompts']} prompts at 50 steps with {full} in full;"
        f" {report['unseen_prompts']} unseen prompts in each place.\n"
    )
    yield (
        "Reuse runs on lesa's own list of full steps, peers on theirs, with at most 15 % more of"
        " them and on short runs one more.\n"
    )
    head = ("place", "lesa, mean", "p10", "over reuse", "best peer", "over the best peer")
    yield from table(head, map(_place, report["places"]))
    yield ""


def _place(place: dict[str, Any]) -> list[str]:
    *peers, _, lesa = place["rows"]  # reuse on lesa's list is the last but one
    peer = max(peers, key=lambda row: decibels(row["psnr_mean"]))
    gains = [place[kind] for kind in ("over_reuse", "gain")]
    reuse, best = [f"{g['value']:+.1f} ({g['low']:+.1f} to {g['high']:+.1f})" for g in gains]
    values = shown(lesa["psnr_mean"]), shown(lesa["psnr_p10"])
    named = f"{label(peer)}: {shown(peer['psnr_mean'])}"
    return [place["place"], *values, reuse, named, best]
