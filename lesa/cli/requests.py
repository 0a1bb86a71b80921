"""What a command was asked for: one frozen object per command, whose fields are its options."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lesa.cli import completion
from lesa.cli.checks import check_at_least, check_at_most, check_finite, check_step_seconds
from lesa.cli.names import choose
from lesa.cli.options import FORECASTER, OUTPUT, PIPELINE, PROMPTS, Counts, Prompts, Steps
from lesa.cli.run_request import RunRequest
from lesa.errors import LesaError
from lesa.util.prompts import check_text, read_other_prompts, read_prompts

if TYPE_CHECKING:
    from lesa.training.budget import Budget

FORMS, TAPS = ("continuous", "disca", "paper", "table"), ("hidden", "output")
MOST_ROUNDS, MOST_FPS = 100, 1000
COUNTED = {"model", "flops_only", "full_steps", "num_inference_steps", "height", "width", "frames"}
QUALITIES, MODES = ("best", "balanced", "fast"), ("off", "route", "spend")


@dataclass(frozen=True, kw_only=True)
class TrainRequest(RunRequest):
    """`lesa train`."""

    prompts: Prompts = None
    out: Annotated[Path, typer.Option(help="Folder of the forecaster.", rich_help_panel=OUTPUT)]
    full_steps: Counts = None
    form: Annotated[
        str,
        typer.Option(
            help="Of the coefficients: continuous in the noise level, table, paper or disca.",
            rich_help_panel=FORECASTER,
            autocompletion=completion.among(FORMS),
        ),
    ] = "continuous"
    tap: Annotated[
        str | None,
        typer.Option(
            help="What is forecast: the output (default), or hidden features.",
            rich_help_panel=FORECASTER,
            autocompletion=completion.among(TAPS),
        ),
    ] = None
    polish: Annotated[
        int,
        typer.Option(
            help="Rounds of the last fit, of all gaps together; 0: none.",
            rich_help_panel=FORECASTER,
        ),
    ] = 1
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Other prompts, to choose and judge by; default: a quarter of 8 or more.",
            rich_help_panel=PROMPTS,
        ),
    ] = None
    budget: Annotated[
        str | None,
        typer.Option(
            help='At most so many plain generations, or so long: 40, "20min".',
            rich_help_panel=FORECASTER,
        ),
    ] = None
    target_psnr: Annotated[
        float | None,
        typer.Option(
            help="Find the fewest with which 9 pictures of 10 reach so many dB.",
            rich_help_panel=FORECASTER,
        ),
    ] = None
    guard: Annotated[
        str | None,
        typer.Option(
            help="Look for a rule for pictures at risk: route, or spend more full steps.",
            rich_help_panel=FORECASTER,
            autocompletion=completion.among(MODES),
        ),
    ] = None
    num_inference_steps: Annotated[
        str | None,
        typer.Option(
            help="Steps of the sampler, as for generate; several: 50,28.", rich_help_panel=PIPELINE
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what it would take, and load nothing.", rich_help_panel=OUTPUT
        ),
    ] = False
    step_seconds: Annotated[
        float | None,
        typer.Option(
            help="For --dry-run: what one full step of one prompt takes.", rich_help_panel=OUTPUT
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choose(self.form, FORMS, "form")
        if self.tap is not None:
            choose(self.tap, TAPS, "tap")
        check_at_least(0, polish=self.polish)
        check_at_most(MOST_ROUNDS, polish=self.polish)
        check_finite(target_psnr=self.target_psnr)
        if self.guard is not None:
            choose(self.guard, MODES, "guard")
        check_step_seconds(self.step_seconds, self.dry_run)
        from lesa.training.arguments import checked_settings
        from lesa.training.numbers import checked_budget, checked_target

        checked_settings(self.form, self.tap or "output", {})
        budget = checked_budget(self.budget, self.form)
        check_finite(budget=budget.seconds or budget.generations)
        try:
            checked_target(self.target_psnr, self.form, None, ())
        except LesaError as error:
            raise LesaError(str(error).replace("target_psnr", "target-psnr", 1)) from None

    @property
    def allowed(self) -> Budget:
        """What training may cost."""
        from lesa.training.budget import Budget

        return replace(Budget.parse(self.budget), guard=self.guard not in (None, "off"))

    def texts(self) -> list[str]:
        """The calibration prompts; LesaError if there is none."""
        if self.prompts is None:
            raise LesaError("prompts=None: none given; give --prompts FILE")
        return read_prompts(self.prompts)

    def validation_texts(self, fitted: list[str]) -> list[str] | None:
        """The prompts of --validation; None where a share of the others is to serve.

        Raises: LesaError if there is none in the file, or one that is fitted too.
        """
        if self.validation is None:
            return None
        return read_other_prompts(self.validation, "validation", fitted, "fitted too")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest(RunRequest):
    """`lesa generate`."""

    prompt: Annotated[
        list[str] | None, typer.Option(help="One prompt; repeatable.", rich_help_panel=PROMPTS)
    ] = None
    prompts: Prompts = None
    out: Annotated[Path, typer.Option(help="Folder of the pictures.", rich_help_panel=OUTPUT)]
    fps: Annotated[
        int, typer.Option(help="Frames of a video per second.", rich_help_panel=OUTPUT)
    ] = 16
    forecaster: Annotated[
        str | None,
        typer.Option(
            help="Folder, hub id, or lesa-untrained, fora, ...; without: plain run.",
            rich_help_panel=FORECASTER,
            autocompletion=completion.forecasters,
        ),
    ] = None
    full_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps that run the whole model; by default, of those trained for, the one"
            " nearest to a fifth.",
            rich_help_panel=FORECASTER,
        ),
    ] = None
    interval: Annotated[
        int | None,
        typer.Option(
            help="Instead: the paper's rule, every N-th step in full.", rich_help_panel=FORECASTER
        ),
    ] = None
    target_speedup: Annotated[
        float | None,
        typer.Option(
            help="Instead: the most trained full steps that are so many times faster.",
            rich_help_panel=FORECASTER,
        ),
    ] = None
    target_psnr: Annotated[
        float | None,
        typer.Option(
            help="Instead: the fewest with which 9 pictures of 10 reach so many dB.",
            rich_help_panel=FORECASTER,
        ),
    ] = None
    quality: Annotated[
        str | None,
        typer.Option(
            help="Instead: best, balanced or fast, of those trained.",
            rich_help_panel=FORECASTER,
            autocompletion=completion.among(QUALITIES),
        ),
    ] = None
    guard: Annotated[
        str | None,
        typer.Option(
            help="Of a forecaster that was trained with one: route, spend or off.",
            rich_help_panel=FORECASTER,
            autocompletion=completion.among(MODES),
        ),
    ] = None
    num_inference_steps: Steps = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guard is not None:
            choose(self.guard, MODES, "guard")
        check_at_least(1, fps=self.fps, num_inference_steps=self.num_inference_steps)
        check_at_most(MOST_FPS, fps=self.fps)
        check_finite(target_speedup=self.target_speedup, target_psnr=self.target_psnr)
        if self.quality is not None:
            choose(self.quality, QUALITIES, "quality")

    @property
    def full(self) -> dict[str, Any]:
        """What was said of the full steps."""
        names = "full_steps", "interval", "target_speedup", "target_psnr", "quality"
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def texts(self) -> list[str]:
        """All prompts; LesaError if there is none."""
        given = [check_text(text, "prompt") for text in self.prompt or ()]
        texts = [*given, *(read_prompts(self.prompts) if self.prompts else [])]
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

    prompts: Prompts = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Other prompts, for methods that need thresholds.", rich_help_panel=PROMPTS
        ),
    ] = None
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.html.", rich_help_panel=OUTPUT)
    ] = None
    submit: Annotated[
        Path | None,
        typer.Option(
            help="New JSON file that others can check; the source must be committed.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="attributes (embedded), image-reward, clip=FOLDER; repeatable.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    methods: Annotated[
        str,
        typer.Option(
            help="all, or a comma list.",
            rich_help_panel=FORECASTER,
            autocompletion=completion.methods,
        ),
    ] = "all"
    forecaster: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a trained forecaster.", rich_help_panel=FORECASTER),
    ] = None
    full_steps: Annotated[
        str | None,
        typer.Option(
            help="Steps that run the whole model: 10, or 13,10,8.", rich_help_panel=FORECASTER
        ),
    ] = None
    searched: Annotated[
        bool,
        typer.Option(
            "--searched", help="Peers also on lesa's full steps.", rich_help_panel=FORECASTER
        ),
    ] = False
    limit: Annotated[
        bool,
        typer.Option(
            "--limit",
            help="Also what fitting on the measured prompts themselves would give.",
            rich_help_panel=FORECASTER,
        ),
    ] = False
    num_inference_steps: Steps = None
    flops_only: Annotated[
        bool,
        typer.Option(
            "--flops-only",
            help="Count operations of a --model, run nothing.",
            rich_help_panel=PIPELINE,
        ),
    ] = False
    model: Annotated[
        str | None,
        typer.Option(
            help="flux.1-dev, qwen-image, hunyuanvideo, sdxl, ...", rich_help_panel=PIPELINE
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_inference_steps=self.num_inference_steps)
        if self.flops_only or self.model is not None:
            if not self.flops_only or self.model is None or self.pipeline is not None:
                raise LesaError(
                    f"model={self.model!r}: --flops-only and --model go together; give both,"
                    " without a pipeline"
                )
            self._check_counted()
        elif self.pipeline is None or self.prompts is None:
            missing = "pipeline" if self.pipeline is None else "prompts"
            raise LesaError(
                f"{missing}=None: nothing to compare on; give a pipeline and --prompts, or"
                " --flops-only and --model"
            )

    def _check_counted(self) -> None:
        """LesaError for an option that has no effect where operations are counted."""
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name not in COUNTED | {"json"} and value != option.default:
                shown = value if isinstance(value, (int, float)) else repr(str(value))
                raise LesaError(
                    f"{option.name.replace('_', '-')}={shown}: --flops-only measures nothing; leave"
                    " it out"
                )
