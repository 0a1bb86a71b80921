"""A tiny FLUX pipeline with the arguments that its transformer gets, for loops of other engines."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import lesa
from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.forecasters import LesaForecaster
from lesa.hooks.noise_levels import noise_levels
from tests.tiny_pipelines import build, run

STEPS, FULL = 8, Schedule.explicit([0, 1, 4])
NAMES = "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance"


def captured():
    """The pipeline, its plain result, the first latents, and the arguments of both predictions."""
    pipe, call = build("flux")
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    arguments = call(num_inference_steps=STEPS)
    plain = run(pipe, arguments)
    handle.remove()
    return SimpleNamespace(
        pipe=pipe,
        call=lambda: call(num_inference_steps=STEPS),
        plain=plain,
        latents=seen[0]["hidden_states"],
        conds=[{name: kwargs.get(name) for name in NAMES} for kwargs in seen[:2]],
        cfg=arguments["true_cfg_scale"],
        levels=noise_levels(pipe.scheduler, 0, STEPS),
        sigmas=pipe.scheduler.sigmas.clone(),
    )


def trained(levels, *, latent=False, model="FluxTransformer2DModel", **fields):
    """Rows of two features for `FULL` and these levels, other ones in each branch."""
    made = LesaForecaster(
        form="table",
        history=2,
        uses_latent=latent,
        branches=("cond", "uncond"),
        metadata={"model_class": model},
        **fields,
    )
    for i, branch in enumerate(made.branches):
        table = Table.from_rows(FULL.bind(STEPS), 2, lambda s, _, i=i: [1.3 + i / 4, -0.3 - i / 4])
        rows = table.coefficients
        if latent:
            rows = torch.cat([rows, 0.01 * (1 + i) * (rows[:, :1] != 0)], dim=1)
        made.correct(table.schedule, levels, branch, rows)
    return made


def under_lesa(case, forecaster, **options):
    """What the pipeline makes with it."""
    with lesa.accelerate(case.pipe, forecaster, schedule=FULL, **options):
        return run(case.pipe, case.call())


@torch.no_grad()
def loop(case, predict, scheduler):
    """The pipeline's loop over `predict(step, latents, time, cond)`, prompt first."""
    scheduler.set_timesteps(sigmas=case.sigmas[:-1].tolist(), device="cpu")
    latents = case.latents
    for step, time in enumerate(scheduler.timesteps):
        positive, negative = [predict(step, latents, time, cond) for cond in case.conds]
        guided = negative + case.cfg * (positive - negative)
        latents = scheduler.step(guided, time, latents, return_dict=False)[0]
    return latents
