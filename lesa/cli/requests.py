"""What a command was asked for: one frozen object per command, whose fields are its options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lesa.cli.options import (
    Attention,
    Batch,
    Compile,
    Counts,
    Device,
    Dtype,
    Embedded,
    Guidance,
    Json,
    Pipeline,
    Prompts,
    Seed,
    Size,
    Steps,
)
from lesa.errors import LesaError
from lesa.util.files import read_prompts

if TYPE_CHECKING:
    from lesa.cli.full_step import FullStep


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """How a pipeline is loaded and called, in every command that runs one."""

    guidance_scale: Guidance = None
    height: Size = None
    width: Size = None
    seed: Seed = 0
    batch_size: Batch = 8
    device: Device = None
    dtype: Dtype = None
    attention_backend: Attention = None
    compile: Compile = False
    json: Json = None

    @property
    def full_step(self) -> FullStep:
        """What is switched on to make a full step itself faster."""
        from lesa.cli.full_step import FullStep

        return FullStep(self.attention_backend, self.compile)

    def settings(self, pipeline: str, **more: int | None) -> dict[str, Any]:
        """Arguments of `pipe(...)`: the given ones over the pipeline's own."""
        from lesa.cli.inputs import call_settings

        size = {"height": self.height, "width": self.width}
        return call_settings(pipeline, {"guidance_scale": self.guidance_scale, **size, **more})

    def check_target(self, pipeline: str) -> None:
        """LesaError if the device, the dtype or what makes a full step faster is not to be had."""
        from lesa.cli.inputs import check_target

        check_target(pipeline, self.device, self.dtype, self.full_step)

    def load(self, pipeline: str) -> Any:
        """The pipeline on its device; LesaError if it cannot be loaded."""
        from lesa.cli.inputs import load_pipeline

        return load_pipeline(
            pipeline, device=self.device, dtype=self.dtype, full_step=self.full_step
        )


@dataclass(frozen=True, kw_only=True)
class TrainRequest(RunRequest):
    """`lesa train`."""

    pipeline: Pipeline
    prompts: Prompts
    out: Annotated[Path, typer.Option(help="Folder of the forecaster.")]
    num_inference_steps: Annotated[
        str | None, typer.Option(help="Steps of the sampler, as for generate; several: 50,28.")
    ] = None
    full_steps: Counts = None
    form: Annotated[str, typer.Option(help="continuous, paper or table.")] = "continuous"
    tap: Annotated[str | None, typer.Option(help="hidden or output.")] = None
    polish: Annotated[
        int, typer.Option(min=0, help="Rounds of the last fit, the longest part; 0 leaves it out.")
    ] = 2


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(RunRequest):
    """`lesa generate`."""

    pipeline: Pipeline
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")]
    prompt: Annotated[list[str] | None, typer.Option(help="One prompt; repeatable.")] = None
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line.")] = None
    forecaster: Annotated[
        str | None,
        typer.Option(help="Folder, hub id, or fora, taylor-1, ...; without: plain run."),
    ] = None
    full_steps: Annotated[int | None, typer.Option(help="Number of full steps.")] = None
    interval: Annotated[
        int | None, typer.Option(help="Instead: the paper's rule, every N-th step in full.")
    ] = None
    num_inference_steps: Steps = None

    def texts(self) -> list[str]:
        """All prompts; LesaError if there is none."""
        texts = [*(self.prompt or []), *(read_prompts(self.prompts) if self.prompts else [])]
        if not texts:
            raise LesaError(
                "prompts=None: none given; give --prompt 'a red circle' or --prompts FILE"
            )
        return texts


@dataclass(frozen=True, kw_only=True)
class CompareRequest(RunRequest):
    """`lesa compare`: methods on a pipeline, or with `flops_only` the operations of a model.

    Raises: LesaError where it is neither of the two.
    """

    pipeline: Annotated[str | None, typer.Option(help=Embedded)] = None
    prompts: Annotated[
        Path | None, typer.Option(help="All measured: text, CSV, TSV, JSON or JSONL.")
    ] = None
    num_inference_steps: Steps = None
    full_steps: Annotated[
        str | None, typer.Option(help="Steps that run the whole model; 10, or several: 13,10,8.")
    ] = None
    methods: Annotated[str, typer.Option(help="all, or a comma list.")] = "all"
    forecaster: Annotated[
        str | None, typer.Option(help="Folder or hub id of a trained forecaster.")
    ] = None
    calibration: Annotated[
        Path | None, typer.Option(help="Other prompts, for methods that need thresholds.")
    ] = None
    searched: Annotated[
        bool, typer.Option("--searched", help="Peers also on lesa's full steps.")
    ] = False
    judge: Annotated[
        list[str] | None,
        typer.Option(help="attributes (embedded), image-reward, clip=FOLDER; repeatable."),
    ] = None
    limit: Annotated[
        bool, typer.Option("--limit", help="Also fit on every prompt itself, as a bound.")
    ] = False
    report: Annotated[Path | None, typer.Option(help="Folder for report.html.")] = None
    frames: Annotated[int | None, typer.Option(help="Frames of a video.")] = None
    flops_only: Annotated[
        bool, typer.Option("--flops-only", help="Count operations of a --model, run nothing.")
    ] = False
    model: Annotated[
        str | None, typer.Option(help="flux.1-dev, qwen-image, hunyuanvideo, sdxl, ...")
    ] = None

    def __post_init__(self) -> None:
        if self.flops_only or self.model is not None:
            if not self.flops_only or self.model is None or self.pipeline is not None:
                raise LesaError(
                    f"model={self.model!r}: --flops-only and --model go together; give both,"
                    " without --pipeline"
                )
        elif self.pipeline is None or self.prompts is None:
            missing = "pipeline" if self.pipeline is None else "prompts"
            raise LesaError(
                f"{missing}=None: nothing to compare on; give --pipeline and --prompts, or"
                " --flops-only and --model"
            )
