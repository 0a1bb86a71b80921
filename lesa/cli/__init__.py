"""The commands: each reads its input, calls the library once and prints what came out."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lesa.cli.inputs import (
    call_settings,
    check_target,
    embedded_name,
    load_forecaster,
    load_pipeline,
    parse_counts,
)
from lesa.cli.output import (
    INTERRUPTED,
    JsonCommand,
    check_json,
    complain,
    console,
    emit,
    guarded,
)
from lesa.errors import LesaError
from lesa.util.files import read_prompts, require_writable, write_atomically

if TYPE_CHECKING:
    from lesa.cli.full_step import FullStep

app = typer.Typer(
    name="lesa",
    help="Diffusion pipelines, several times faster: most denoising steps are forecast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Pipeline = Annotated[
    str, typer.Argument(help="A folder, a hub id, or an embedded one: testbed, testbed:qwen.")
]
Prompts = Annotated[Path, typer.Option("--prompts", help="Text file, one prompt per line.")]
Steps = Annotated[
    int | None, typer.Option(help="Steps of the sampler; the embedded pipeline's own, else 50.")
]
Counts = Annotated[
    str, typer.Option("--full-steps", help="Steps that run the whole model; several: 13,10,8.")
]
Json = Annotated[
    Path | None,
    typer.Option("--json", help="Write JSON to this .json file; alone or '-': to stdout."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; CUDA where there is any.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
Attention = Annotated[
    str | None,
    typer.Option("--attention-backend", help="diffusers' attention: flash, sage, ...; see env."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the denoiser's repeated blocks (torch.compile).")
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of the pipeline.")]
Size = Annotated[int | None, typer.Option(help="In pixels; the pipeline's own by default.")]
Seed = Annotated[int, typer.Option(help="Prompt i is drawn with seed + i.")]
Batch = Annotated[int, typer.Option(min=1, help="Prompts at a time.")]


@app.command(cls=JsonCommand)
@guarded
def demo(
    pipeline: Annotated[str, typer.Option(help="An embedded pipeline.")] = "flux",
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("lesa-demo"),
    prompts_count: Annotated[int, typer.Option(min=1, help="Prompts to train on.")] = 16,
    json: Json = None,
) -> None:
    """Train on the embedded pipeline, skip most steps of unseen prompts, show the pictures.

    Example: lesa demo --out lesa-demo
    """
    check_json(json)
    require_writable(out)
    from lesa.cli.run_demo import run_demo

    emit(json, run_demo(embedded_name(pipeline) or pipeline, out, prompts_count, console(json)))


@app.command(cls=JsonCommand)
@guarded
def train(
    pipeline: Pipeline,
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="Folder of the forecaster.")],
    num_inference_steps: Annotated[
        str | None, typer.Option(help="Steps of the sampler, as for generate; several: 50,28.")
    ] = None,
    full_steps: Counts = "13,10,8",
    form: Annotated[str, typer.Option(help="continuous, paper or table.")] = "continuous",
    tap: Annotated[str | None, typer.Option(help="hidden or output.")] = None,
    polish: Annotated[
        int, typer.Option(min=0, help="Rounds of the last fit, the longest part; 0 leaves it out.")
    ] = 2,
    guidance_scale: Guidance = None,
    height: Size = None,
    width: Size = None,
    seed: Seed = 0,
    batch_size: Batch = 8,
    device: Device = None,
    dtype: Dtype = None,
    attention_backend: Attention = None,
    compile: Compile = False,
    json: Json = None,
) -> None:
    """Train a forecaster for a pipeline; an interrupted collection goes on where it stopped.

    Example: lesa train testbed --prompts prompts.txt --full-steps 13,10,8 --out my-lesa
    """
    settings = call_settings(
        pipeline, {"guidance_scale": guidance_scale, "height": height, "width": width}
    )
    if num_inference_steps is None:
        num_inference_steps = f"{settings['num_inference_steps']}"
    steps = parse_counts(num_inference_steps, field="num-inference-steps")
    counts = parse_counts(full_steps, min(steps))
    texts = read_prompts(prompts)
    full_step = _full_step(attention_backend, compile)
    check_target(pipeline, device, dtype, full_step)
    require_writable(out)
    check_json(json)
    pipe = load_pipeline(pipeline, device=device, dtype=dtype, full_step=full_step)
    full_step.warm_up(pipe, texts[:batch_size], settings)
    import lesa

    optional: dict[str, Any] = {} if tap is None else {"tap": tap}
    forecaster = lesa.train(
        pipe,
        texts,
        num_inference_steps=steps,
        full_steps=counts,
        form=form,
        polish=polish,
        batch_size=batch_size,
        call=settings,
        seed=seed,
        folder=out,
        **optional,
    )
    forecaster.save_pretrained(out)
    lists = [{"num_steps": s.steps, "full_steps": s.full_steps} for s in forecaster.calibrated]
    for schedule in forecaster.calibrated:
        listed = ", ".join(map(str, schedule.full_steps))
        console(json).print(f"{len(schedule.full_steps)} of {schedule.steps} in full: {listed}")
    console(json).print(f"forecaster in {out}")
    facts = {"folder": out, "calibrated": lists, "metadata": forecaster.metadata}
    emit(json, facts | asdict(full_step))


@app.command(cls=JsonCommand)
@guarded
def generate(
    pipeline: Pipeline,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    prompt: Annotated[list[str] | None, typer.Option(help="One prompt; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None,
    forecaster: Annotated[
        str | None,
        typer.Option(help="Folder, hub id, or fora, taylor-1, ...; without: plain run."),
    ] = None,
    full_steps: Annotated[int | None, typer.Option(help="Number of full steps.")] = None,
    interval: Annotated[
        int | None, typer.Option(help="Instead: the paper's rule, every N-th step in full.")
    ] = None,
    num_inference_steps: Steps = None,
    guidance_scale: Guidance = None,
    height: Size = None,
    width: Size = None,
    seed: Seed = 0,
    batch_size: Batch = 8,
    device: Device = None,
    dtype: Dtype = None,
    attention_backend: Attention = None,
    compile: Compile = False,
    json: Json = None,
) -> None:
    """Make pictures, plain or accelerated, as PNG files.

    Example: lesa generate testbed --forecaster my-lesa --full-steps 10 --prompts p.txt --out pics
    """
    from lesa.cli.commands import checked_schedule, make_pictures

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not texts:
        raise LesaError("prompts: none given; give --prompt 'a red circle' or --prompts FILE")
    given = {"guidance_scale": guidance_scale, "height": height, "width": width}
    settings = call_settings(pipeline, {**given, "num_inference_steps": num_inference_steps})
    cache = checked_schedule(forecaster, full_steps, interval, settings["num_inference_steps"])
    full_step = _full_step(attention_backend, compile)
    check_target(pipeline, device, dtype, full_step)
    require_writable(out)
    check_json(json)
    learned = load_forecaster(forecaster) if forecaster else None
    pipe = load_pipeline(pipeline, device=device, dtype=dtype, full_step=full_step)
    full_step.warm_up(pipe, texts[:batch_size], settings)
    facts = make_pictures(pipe, texts, settings, out, learned, cache, seed, batch_size)
    facts |= asdict(full_step)
    console(json).print(f"{len(texts)} pictures in {out}, {facts['seconds']:.3g} s of denoising")
    if facts["stats"]:
        console(json).print(facts["summary"])
    emit(json, facts)


@app.command(cls=JsonCommand)
@guarded
def compare(
    pipeline: Annotated[
        str | None,
        typer.Option(help="A folder, a hub id, or an embedded one: testbed, testbed:qwen."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="All measured: text, CSV, TSV, JSON or JSONL.")
    ] = None,
    num_inference_steps: Steps = None,
    full_steps: Annotated[
        str | None, typer.Option(help="Steps that run the whole model; 10, or several: 13,10,8.")
    ] = None,
    methods: Annotated[str, typer.Option(help="all, or a comma list.")] = "all",
    forecaster: Annotated[
        str | None, typer.Option(help="Folder or hub id of a trained forecaster.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Other prompts, for methods that need thresholds.")
    ] = None,
    searched: Annotated[
        bool, typer.Option("--searched", help="Peers also on lesa's full steps.")
    ] = False,
    judge: Annotated[
        list[str] | None,
        typer.Option(help="attributes (embedded), image-reward, clip=FOLDER; repeatable."),
    ] = None,
    limit: Annotated[
        bool, typer.Option("--limit", help="Also fit on every prompt itself, as a bound.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Folder for report.html.")] = None,
    guidance_scale: Guidance = None,
    height: Size = None,
    width: Size = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video.")] = None,
    seed: Seed = 0,
    batch_size: Batch = 8,
    device: Device = None,
    dtype: Dtype = None,
    attention_backend: Attention = None,
    compile: Compile = False,
    flops_only: Annotated[
        bool, typer.Option("--flops-only", help="Count operations of a --model, run nothing.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="flux.1-dev, qwen-image, hunyuanvideo, sdxl, ...")
    ] = None,
    json: Json = None,
) -> None:
    """Measure methods against the plain run of the same prompts and seeds.

    Example: lesa compare --pipeline testbed --prompts p.txt --forecaster my-lesa --json out.json
    """
    from lesa.cli.run_compare import run_compare, run_flops

    check_json(json)
    size = {"height": height, "width": width}
    if flops_only or model is not None:
        if not flops_only or model is None or pipeline is not None:
            raise LesaError("model: --flops-only and --model go together, without --pipeline")
        size |= {"num_steps": num_inference_steps, "frames": frames}
        emit(json, run_flops(model, full_steps, console(json), **size))
        return
    if pipeline is None or prompts is None:
        raise LesaError("pipeline: give --pipeline and --prompts, or --flops-only and --model")
    given = {"num_inference_steps": num_inference_steps, "num_frames": frames, **size}
    result = run_compare(
        pipeline,
        prompts,
        {**given, "guidance_scale": guidance_scale},
        full_steps=full_steps,
        methods=methods,
        forecaster=forecaster,
        calibration=calibration,
        searched=searched,
        judges=judge or [],
        limit=limit,
        report=report,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        full_step=_full_step(attention_backend, compile),
        console=console(json),
    )
    emit(json, result)


@app.command(cls=JsonCommand)
@guarded
def inspect(
    folder: Annotated[str, typer.Argument(help="Folder or hub id of a trained forecaster.")],
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the tables into this folder as PNG.")
    ] = None,
    json: Json = None,
) -> None:
    """Show a forecaster: its full steps, its tables as pictures, and where it comes from.

    Example: lesa inspect my-lesa --picture tables
    """
    from lesa.cli.commands import describe, draw_tables, print_forecaster
    from lesa.forecasters.lesa import LesaForecaster

    check_json(json)
    if picture is not None:
        require_writable(picture, "picture")
    trained = LesaForecaster.from_pretrained(folder)
    print_forecaster(trained, console(json))
    for path, png in draw_tables(trained, picture).items():
        console(json).print(f"drawn: {write_atomically(path, png)}")
    emit(json, describe(trained))


@app.command(cls=JsonCommand)
@guarded
def env(
    models: Annotated[
        bool, typer.Option("--models", help="List the denoiser classes instead.")
    ] = False,
    json: Json = None,
) -> None:
    """Print versions, devices and active backends, for a bug report.

    Example: lesa env --json
    """
    from lesa.cli.commands import environment, environment_lines, model_rows, models_table

    check_json(json)
    if models:
        rows = model_rows()
        console(json).print(models_table(rows))
        emit(json, rows)
        return
    facts: dict[str, Any] = environment()
    for name, text in environment_lines(facts):
        console(json).print(f"{name:>16}  {text}", markup=False, soft_wrap=True)
    emit(json, facts)


def _full_step(attention: str | None, compile: bool) -> FullStep:
    from lesa.cli.full_step import FullStep

    return FullStep(attention, compile)


def main() -> None:
    """Entry point of `lesa`; an interrupt, also one outside of a command, ends with status 130."""
    try:
        app()
    except KeyboardInterrupt:
        complain("interrupted; what was finished is kept")
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
    # A caught interrupt that fell into an exec() (dataclasses, at import) still makes CPython
    # end itself by the signal, so its own way out is not taken.
    sys.stdout.flush()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
