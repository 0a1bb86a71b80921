"""docs/results/submitted.md: what `lesa compare --submit` wrote, on whatever machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from _result_tables import shown, table, title

WHAT = """Each section is one file of `benchmarks/results/submitted/`, which `lesa compare --submit`
wrote on the machine that it names. There is no such file where the source differed from its commit,
before or after the runs; [result.schema.json](../result.schema.json) describes the fields.

To add yours: run the command in a clean checkout, put the file into that folder, and run the
script. Whoever has the pipeline and the prompts, told by their hashes, can run it again: PSNR
should agree, seconds are the machine's. The prompts of the embedded pipelines lie beside the files.

Seconds are of one batch's loop. "Faster" is the plain loop's time over the accelerated one's, next
to each other; where the load is above the number of cores, other programs are in it. "By CPU time"
counts what the process itself computed, on a CPU alone. The peak is what CUDA allocated beyond the
weights during a batch.
"""
DENOISERS = ("transformer", "transformer_2", "unet")
HEAD = ("method", "full steps", "PSNR mean", "p10", "minimum", "LPIPS mean", "largest")
MORE = ("plain, s", "accelerated, s", "faster", "by CPU time", "cache, MB", "peak, GB")


def submitted_page(files: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A section per file, by its name."""
    yield "# Submitted results\n"
    yield WHAT
    for name, part in files.items():
        yield f"## {_heading(part)} (`submitted/{name}`)\n"
        yield "; ".join(_provenance(part)) + ".\n"
        yield from table((*HEAD, *MORE), (_line(part, row) for row in part["rows"]))
        yield ""
        if (reason := part["missing"].get("lpips")) is not None:
            yield f"No LPIPS: {reason}.\n"
        yield from (f"{note}\n" for note in part["notes"])


def _heading(part: dict[str, Any]) -> str:
    """The recipe where it was run as it is, else the pipeline."""
    recipe = part["recipe"]
    whole = recipe is not None and recipe["own"] and not recipe["overridden"]
    return str(recipe["name"] if whole else part["pipeline"]["name"])


def _provenance(part: dict[str, Any]) -> Iterator[str]:
    """Machine, versions, commit, and the hashes of what was measured."""
    at, source, recipe = part["environment"], part["source"], part["recipe"]
    versions = ("python", "torch", "diffusers", "lesa")
    load = "" if at["load"] is None else f", load {at['load']:.1f}"
    yield f"{at['device']['name']}, cores {at['cores']}, threads {at['threads']}{load}"
    yield f"commit {source['commit'][:12]} ({source['kind']}), {part['date'][:10]}"
    yield ", ".join(f"{name} {at['versions'][name]}" for name in versions)
    pipe, call = part["pipeline"], part["call"]
    weights = [hash for key, hash in pipe["weights"].items() if key in DENOISERS]
    yield ", ".join([f"{pipe['class']} in {pipe['dtype']}", *(f"weights {w}" for w in weights)])
    yield f"{part['scheduler']['class']} {part['scheduler']['sha256'][:12]}"
    steps, size = call["num_inference_steps"], part["batch_size"]
    yield f"{steps} steps, {part['pairs']} pairs, batches of {size}"
    yield f"prompts {part['prompts']['sha256'][:12]}, seed {part['seed']}"
    if (forecaster := part["forecaster"]) is not None:
        told = f" {forecaster['sha256'][:12]}" if forecaster["sha256"] else ""
        yield f"forecaster {forecaster['name']}{told}"
    if (held := part["process_peak_bytes"]) is not None:
        yield f"at most {held / 1e9:.2f} GB on the host"
    if recipe is not None and recipe["overridden"]:
        yield f"recipe {recipe['name']} but for {', '.join(recipe['overridden'])}"


def _line(part: dict[str, Any], row: dict[str, Any]) -> list[str]:
    psnr, lpips, peak = row["psnr"], row["lpips"], row["peak_bytes"]
    on_cpu = part["environment"]["device"]["type"] == "cpu"
    return [
        title(row),
        f"{row['full_steps']:.4g}",
        *(shown(psnr[key]) for key in ("mean", "p10", "minimum")),
        *(f"{lpips[key]:.4f}" if lpips else "" for key in ("mean", "max")),
        f"{part['plain']['seconds']:.3g}",
        f"{row['seconds']:.3g}",
        f"{row['speedup']:.2f}x",
        f"{part['plain']['cpu_seconds'] / row['cpu_seconds']:.2f}x" if on_cpu else "",
        f"{row['cache_bytes'] / 1e6:.2g}",
        f"{peak / 1e9:.2f}" if peak else "not counted",
    ]
