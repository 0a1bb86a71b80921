"""How a pipeline is loaded and called, in every command that runs one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lesa.cli.checks import check_at_least, check_finite, check_seed, check_size
from lesa.cli.options import (
    Attention,
    Batch,
    Compile,
    Device,
    Dtype,
    Frames,
    Further,
    Guidance,
    Json,
    NegativePrompt,
    Pipeline,
    Scheduler,
    Seed,
    Size,
)
from lesa.cli.recipe import Config, Recipe
from lesa.errors import LesaError
from lesa.util.prompts import check_text

if TYPE_CHECKING:
    from lesa.cli.full_step import FullStep
    from lesa.cli.saved import Saved

_GIVE = "give a folder, a hub id, or an embedded one such as testbed"


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """The options of every command that runs a pipeline.

    Raises: LesaError for a value that no pipeline takes.
    """

    pipeline: Pipeline = None
    config: Config = None
    negative_prompt: NegativePrompt = None
    scheduler: Scheduler = None
    guidance_scale: Guidance = None
    height: Size = None
    width: Size = None
    frames: Frames = None
    set: Further = None
    seed: Seed = 0
    batch_size: Batch = 8
    device: Device = None
    dtype: Dtype = None
    attention_backend: Attention = None
    compile: Compile = False
    json: Json = None

    def __post_init__(self) -> None:
        from lesa.cli.inputs import check_dtype
        from lesa.cli.schedulers import check_scheduler

        check_at_least(1, batch_size=self.batch_size)
        check_size(self.height, self.width, self.frames)
        check_finite(guidance_scale=self.guidance_scale)
        check_seed(self.seed)
        if self.negative_prompt is not None:
            check_text(self.negative_prompt, "negative-prompt")
        if self.scheduler is not None:
            check_scheduler(self.scheduler)
        if self.dtype is not None:
            check_dtype(self.dtype)

    @property
    def named(self) -> str:
        """The name of the pipeline; LesaError where none is given."""
        if self.pipeline is None:
            raise LesaError(f"pipeline=None: none given; {_GIVE}")
        return self.pipeline

    @property
    def recipe(self) -> Recipe:
        """What --config names; a recipe that says nothing without it."""
        return Recipe() if self.config is None else self.config

    def saved(self, without: bool = False) -> Saved:
        """What the pipeline is, before it is loaded; without=True: by the recipe's model where the
        pipeline does not lie here.

        Raises: LesaError where there is none, or one of another class than the recipe's.
        """
        from lesa.cli.inputs import embedded_name
        from lesa.cli.saved import look_at

        recipe, model = self.recipe, self.recipe.model
        there = os.path.exists(self.named) or embedded_name(self.named) is not None
        found = model.saved(self.named) if without and model and not there else look_at(self.named)
        if model is not None:
            model.check(found.kind, found.denoiser)
        recipe.preparation.check_scheduler(self.scheduler, found.scheduler)
        return found

    @property
    def full_step(self) -> FullStep:
        """What is switched on to make a full step itself faster."""
        from lesa.cli.full_step import FullStep

        return FullStep(self.attention_backend, self.compile)

    def settings(self, saved: Saved, forecaster: Any = None, **more: Any) -> dict[str, Any]:
        """Arguments of `pipe(...)`: the given ones, over the forecaster's, over the pipeline's. The
        number of steps is the recipe's where no trained forecaster has one.

        Raises: LesaError for what the pipeline does not take, as far as it can be told of `saved`.
        """
        from lesa.cli.calls import call_settings, further_arguments

        given = {
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "negative_prompt": self.negative_prompt,
            **further_arguments(self.set or ()),
            **more,
        }
        if not getattr(forecaster, "calibrated", ()) and "num_inference_steps" in given:
            given["num_inference_steps"] = given["num_inference_steps"] or self.recipe.steps
        saved.check_forecaster(forecaster)
        settings = call_settings(saved, given, forecaster)
        if self.scheduler is not None:
            from lesa.cli.schedulers import check_scheduler

            check_scheduler(self.scheduler, saved.scheduler)
        return settings

    def check_target(self) -> None:
        """LesaError if the device, the dtype or what makes a full step faster is not to be had."""
        from lesa.cli.inputs import check_target

        check_target(self.named, self.device, self.dtype, self.full_step)

    def load(self, settings: dict[str, Any], prompts: list[str], forecaster: Any = None) -> Any:
        """The pipeline on its device, once it was called up to its first step.

        Without `--scheduler` it gets the sampler that the forecaster was trained with.

        Raises: LesaError if it cannot be loaded, or refuses its arguments.
        """
        from lesa.cli import inputs
        from lesa.cli.rehearsal import rehearse
        from lesa.cli.schedulers import set_trained_scheduler

        pipe = inputs.load_pipeline(
            self.named,
            device=self.device,
            dtype=self.dtype,
            scheduler=self.scheduler,
            full_step=self.full_step,
            preparation=self.recipe.preparation,
        )
        if self.scheduler is None:
            set_trained_scheduler(pipe, forecaster)
        rehearse(pipe, prompts, settings, self.scheduler)
        return pipe
