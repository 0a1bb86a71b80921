"""Run what docs/models.md states about every denoiser class, and write its table.

    python benchmarks/make_models_table.py --out docs/models.md [--only flux --only sdxl]

Every cell is the outcome of a check on a tiny random-weight pipeline of the real classes, on CPU.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import accelerate  # noqa: E402
import diffusers  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from _environment import commit  # noqa: E402
from model_checks import (  # noqa: E402
    SCHEDULE,
    check_full_steps_are_plain,
    check_reuse_is_exact,
    check_skips,
    first_call,
)
from published_schedulers import TINY  # noqa: E402
from tiny_pipelines import IMG2IMG, ROWS, build, build_img2img, run  # noqa: E402

import lesa  # noqa: E402
from lesa.api import find_denoiser  # noqa: E402
from lesa.hooks.model_specs import model_spec  # noqa: E402
from lesa.util.files import write_atomically  # noqa: E402
from lesa.util.strict_json import to_json  # noqa: E402

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
RESULTS = ROOT / "benchmarks" / "results" / "models"  # one file per row
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"


class NotApplicable(Exception):
    """The class has no such thing; the message says what is missing."""


class NotRun(Exception):
    """There is such a thing, but no check of it that runs here; the message says why."""


def of_a_model(name: str) -> str:
    model, arguments = tiny_models.build(name)
    check_reuse_is_exact(model, (), arguments)
    return "yes"


def taps_of_a_model(name: str) -> str:
    """The hidden tap by `of_a_model`, the output tap in a custom loop of six calls."""
    model, arguments = tiny_models.build(name)
    lesa.apply_lesa_cache(
        model, lesa.LesaConfig(lesa.Reuse(), num_inference_steps=6, schedule=SCHEDULE, tap="output")
    )
    with torch.no_grad():
        for _ in range(6):
            model(**arguments)
    stats = lesa.stats(model)
    assert (stats.full, stats.skipped, stats.fallbacks) == (3, 3, {}), stats
    return "output, hidden"


def bit_identical(name: str) -> str:
    """a call without blocks, on the feature of the same inputs, equals the full call bit for bit;
    a run with every step in full equals the plain one; afterwards no trace is left on the model."""
    pipe, call = build(name)
    args, kwargs = first_call(pipe, call(num_inference_steps=2))
    check_reuse_is_exact(find_denoiser(pipe), args, kwargs)
    check_full_steps_are_plain(*build(name))
    return "yes"


def skip(name: str) -> str:
    """the taps at which, with 3 of 6 steps in full, each block runs half as often as in the plain
    run, nothing falls back and a second generation repeats the first bit for bit."""
    pipe, call = build(name)
    taps = model_spec(find_denoiser(pipe)).taps
    for tap in taps:
        check_skips(pipe, call, tap)
    return ", ".join(taps)


def guidance(name: str) -> str:
    """how the pipeline calls the denoiser with guidance on, as counted in a plain run; the other
    columns are run with it."""
    pipe, call = build(name)
    model, latents = find_denoiser(pipe), []
    latent = model_spec(model).latent
    model.register_forward_pre_hook(
        lambda _, args, kwargs: latents.append(kwargs[latent] if latent in kwargs else args[0]),
        with_kwargs=True,
    )
    run(pipe, call())
    if len(latents) == 2 * call()["num_inference_steps"]:
        return "two branches"
    if len(latents[0]) == 2:
        return "batched"
    raise NotApplicable("guidance is an embedded number")


def scheduler(name: str) -> str:
    """with the scheduler configuration that diffusers publishes for the model (its source is in
    tests/published_schedulers.py), every step in full equals the plain run, and 3 of 6 steps in
    full skip the other 3 with no fallback."""
    published = TINY[name]
    pipe, call = build(name)
    pipe.scheduler = published.make()
    expected = run(pipe, call())
    with lesa.accelerate(pipe, lesa.Taylor(1), schedule=lesa.Schedule.every(1)):
        assert torch.equal(run(pipe, call()), expected)
    with lesa.accelerate(pipe, lesa.Taylor(1), schedule=SCHEDULE):
        run(pipe, call())
        stats = lesa.stats(pipe)
    assert stats.skipped == stats.full and not stats.fallbacks, stats
    return published.scheduler.removesuffix("Scheduler")


def img2img(name: str) -> str:
    """in the pipeline that takes a picture or a video and `strength=0.5`, every step in full equals
    the plain run, and blocks run on full steps only."""
    if name not in IMG2IMG:
        folder = Path(inspect.getfile(type(build(name)[0]))).parent
        if any("strength: float" in file.read_text() for file in folder.glob("*.py")):
            raise NotRun(
                "the pipeline that takes a strength is of another kind, which is not built here"
            )
        raise NotApplicable("diffusers has no pipeline with a strength for it")
    pipe, call = build_img2img(name)
    check_full_steps_are_plain(pipe, call)
    check_skips(pipe, call, "hidden")
    return "yes"


def compiled(name: str) -> str:
    """`model.compile(fullgraph=True)` with dynamo's eager backend, equal to the run without."""
    expected = _accelerated(*build(name))
    for fullgraph in (True, False):
        torch.compiler.reset()
        pipe, call = build(name)
        find_denoiser(pipe).compile(backend="eager", fullgraph=fullgraph)
        try:
            found = _accelerated(pipe, call)
        except Exception:
            if not fullgraph or _traces_plain(name):
                raise
            continue
        assert torch.equal(found, expected)
        return "yes" if fullgraph else "yes, with the graph breaks that it has without lesa"
    raise AssertionError


def _traces_plain(name: str) -> bool:
    torch.compiler.reset()
    pipe, call = build(name)
    find_denoiser(pipe).compile(backend="eager", fullgraph=True)
    try:
        run(pipe, call(num_inference_steps=2))
    except Exception:
        return False
    return True


def offload(name: str) -> str:
    """accelerate's whole-model and sequential hooks and diffusers' group offloading by leaves, from
    CPU to CPU, each equal to the run without in two generations."""
    expected = _accelerated(*build(name))
    cpu = torch.device("cpu")
    ways: list[Callable[[Any], Any]] = [
        lambda part: accelerate.cpu_offload_with_hook(part, cpu),
        lambda part: accelerate.cpu_offload(part, cpu, offload_buffers=True),
        lambda part: diffusers.hooks.apply_group_offloading(
            part, cpu, cpu, offload_type="leaf_level"
        ),
    ]
    for way in ways:
        pipe, call = build(name)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                way(part)
        assert torch.equal(_accelerated(pipe, call), expected)
        assert torch.equal(_accelerated(pipe, call), expected)
    return "yes"


def lora(name: str) -> str:
    """an adapter on `to_q` and `to_v`: every step in full equals the plain run, and blocks run on
    full steps only, with it; the former also after it was deleted."""
    from peft import LoraConfig

    pipe, call = build(name)
    model = find_denoiser(pipe)
    if not hasattr(model, "add_adapter"):
        raise NotApplicable("the class has no add_adapter")
    expected = run(pipe, call())
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    assert not torch.equal(run(pipe, call()), expected)
    check_full_steps_are_plain(pipe, call)
    check_skips(pipe, call, "hidden")
    model.delete_adapters("default")
    check_full_steps_are_plain(pipe, call)
    return "yes"


def context_parallel(name: str) -> str:
    """two gloo processes with `ulysses_degree=2` agree with one to 1e-4, without a fallback."""
    if getattr(find_denoiser(build(name)[0]), "_cp_plan", None) is None:
        raise NotApplicable("the class has no _cp_plan")
    with tempfile.TemporaryDirectory() as folder:
        processes = torch.multiprocessing.start_processes
        processes(_rank, (name, folder), nprocs=2, start_method="fork")
        failure = Path(folder, "failure")
        if failure.exists():
            raise NotRun(f"diffusers alone fails in parallel on CPU: {failure.read_text()}")
    return "yes"


def _rank(rank: int, name: str, folder: str) -> None:
    expected = _accelerated(*build(name))
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    pipe, call = build(name)
    config = diffusers.ContextParallelConfig(ulysses_degree=2)
    with mock.patch("torch.accelerator.device_count", return_value=1):  # it divides by none on CPU
        find_denoiser(pipe).enable_parallelism(config=config)
    try:
        run(pipe, call(num_inference_steps=1))
    except Exception as error:
        Path(folder, "failure").write_text(str(error).splitlines()[0])
        return
    found = _accelerated(pipe, call)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def _accelerated(pipe: Any, call: Callable[..., dict[str, Any]]) -> torch.Tensor:
    """A run of which three of six steps are forecast at the hidden tap."""
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=SCHEDULE, tap="hidden"):
        found = run(pipe, call())
        stats = lesa.stats(pipe)
    assert stats.skipped and not stats.fallbacks, stats
    return found


COLUMNS: dict[str, Callable[[str], str]] = {
    "bit-identical": bit_identical,
    "skip": skip,
    "CFG": guidance,
    "scheduler": scheduler,
    "img2img": img2img,
    "compile": compiled,
    "offload": offload,
    "LoRA": lora,
    "CP": context_parallel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the page whose table is replaced")
    parser.add_argument("--only", action="append", default=[], help="run this row, keep the others")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.only or [*ROWS, *tiny_models.ROWS]:
        made = {"row": name, **outcomes(name), "commit": commit(), "run": surroundings()}
        write_atomically(RESULTS / f"{name}.json", to_json(made))
        print(made, file=sys.stderr, flush=True)
    page = options.out.read_text()
    head, tail = page.index(BEGIN) + len(BEGIN), page.index(END)
    write_atomically(options.out, f"{page[:head]}\n{table()}\n{page[tail:]}")


def outcomes(name: str) -> dict[str, Any]:
    """Title and cells of a row."""
    if name in tiny_models.ROWS:
        cells = [cell(of_a_model, name), cell(taps_of_a_model, name)]
        rest = "not run: the tests have no tiny pipeline of this class"
        return {"title": name, "cells": cells + [rest] * (len(COLUMNS) - len(cells))}
    pipe = build(name)[0]
    title = f"{type(pipe).__name__}, {type(find_denoiser(pipe)).__name__}"
    return {"title": title, "cells": [cell(check, name) for check in COLUMNS.values()]}


def surroundings() -> str:
    """Date, device and versions of a run."""
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"{date.today()}, CPU, {packages}"


def table() -> str:
    """The kept rows as a Markdown table, the reasons as numbered notes, and what was run."""
    files = [RESULTS / f"{name}.json" for name in (*ROWS, *tiny_models.ROWS)]
    kept = [json.loads(file.read_text()) for file in files if file.exists()]
    lines = [f"| pipeline | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    reasons: list[str] = []
    for row in kept:
        cells = [_noted(text, reasons) for text in row["cells"]]
        lines.append(f"| {row['title']} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    lines += ["", "What the columns say:", ""]
    lines += [
        f"- **{name}**: {' '.join((run.__doc__ or '').split())}" for name, run in COLUMNS.items()
    ]
    runs = sorted({row["run"] for row in kept})
    commits = ", ".join(sorted({row["commit"] for row in kept}))
    return "\n".join(
        [
            *lines,
            "",
            *(f"Run on {run}." for run in runs),
            f"Commits (+: with further changes): {commits}.",
        ]
    )


def cell(check: Callable[[str], str], name: str) -> str:
    """Outcome of a check; "kind: reason" where there is something to say."""
    try:
        return check(name)
    except NotApplicable as reason:
        return f"n/a: {reason}"
    except NotRun as reason:
        return f"not run: {reason}"
    except Exception as error:  # one that fails is a cell of the table, not its end
        return f"no: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}"


def _noted(text: str, reasons: list[str]) -> str:
    """The text of a cell, its reason replaced by the number of a note."""
    kind, _, reason = text.partition(": ")
    if not reason:
        return kind
    if reason not in reasons:
        reasons.append(reason)
    return f"{kind} ({reasons.index(reason) + 1})"


if __name__ == "__main__":
    main()
