"""Distil a student of few steps from an embedded teacher: FLUX.1-schnell from dev,
Qwen-Image-Lightning from Qwen-Image.

The teacher's guided trajectories are integrated finely between the student's noise levels; the
student learns each segment's mean velocity, so that one of its Euler steps lands where the
teacher's many do. Half of the states that it learns from are its own: it starts one segment
earlier, takes that step itself, and its target leads back to the teacher's trajectory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import lesa.testbed
from lesa_testbed.makers import flux, qwen
from lesa_testbed.makers.common import Run, optimise
from lesa_testbed.scenes import scenes
from lesa_testbed.students import save_difference, without_guidance
from lesa_testbed.text import TEXT_LENGTH

Velocity = Callable[[Tensor, float, Tensor], Tensor]  # latents, sigma, caption rows


@dataclass(frozen=True)
class Plan:
    """Every number of a student's training."""

    seed: int = 0
    teacher: str = "flux"
    guidance: float = 3.5
    sigmas: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)
    trajectories: int = 2_048
    substeps: int = 4
    batch: int = 32
    steps: int = 1_200
    lr: float = 4e-4
    ema: float = 0.99
    rank: int = 32


@dataclass(frozen=True)
class Schnell(Plan):
    """The 4-step student of the FLUX pipeline."""


@dataclass(frozen=True)
class Lightning(Plan):
    """The 8-step student of the Qwen-Image pipeline, which needs no second branch."""

    teacher: str = "qwen"
    guidance: float = 4.0
    sigmas: tuple[float, ...] = (1.0, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0.0)
    trajectories: int = 1_024
    steps: int = 1_000
    substeps: int = 2


# That of FLUX.1-schnell, and Qwen-Image-Lightning's: a shift of 3 whatever the token count
SCHEDULERS = {
    "flux": dict(shift=1.0),
    "qwen": dict(use_dynamic_shifting=True, base_shift=log(3), max_shift=log(3)),
}


@torch.no_grad()
def integrate(velocity: Velocity, x: Tensor, sigmas: Sequence[float], rows: Tensor) -> Tensor:
    """Midpoint rule over the list of noise levels: the state at its end."""
    for start, end in zip(sigmas, sigmas[1:], strict=False):
        half = (end - start) / 2
        middle = x + half * velocity(x, start, rows)
        x = x + 2 * half * velocity(middle, start + half, rows)
    return x


def trajectories(run: Run, velocity: Velocity, shape: tuple[int, ...]) -> Tensor:
    """The teacher's states at the student's noise levels, ``[N, S + 1, *shape]`` in fp16.

    Row i belongs to training caption i. Finished parts are kept, so a broken run goes on.
    """
    plan, parts = run.plan, []
    for start in range(0, plan.trajectories, 128):
        if (state := run.load(f"trajectories-{start}")) is None:
            rows = torch.arange(start, start + 128)
            noise = torch.randn(128, *shape, generator=run.generator("noise", start))
            states = [noise]
            for first, last in zip(plan.sigmas, plan.sigmas[1:], strict=False):
                levels = torch.linspace(first, last, plan.substeps + 1).tolist()
                split = zip(states[-1].split(32), rows.split(32), strict=True)
                states.append(torch.cat([integrate(velocity, x, levels, r) for x, r in split]))
            state = {"states": torch.stack(states, 1).half()}
            run.save(f"trajectories-{start}", state)
            run.log(stage="trajectories", done=start + 128, of=plan.trajectories)
        parts.append(state["states"])
    return torch.cat(parts)


def distil(run: Run, states: Tensor, student: nn.Module, velocity: Velocity) -> nn.Module:
    """Fit ``velocity`` (which runs ``student``) to the segments of ``states``; its average."""
    plan, last = run.plan, len(run.plan.sigmas) - 2

    def loss_at(step: int) -> Tensor:
        generator = run.generator("distil", step)
        rows = torch.randint(0, len(states), (plan.batch,), generator=generator)
        segment = int(torch.randint(0, last + 1, (), generator=generator))
        sigma, end = plan.sigmas[segment], plan.sigmas[segment + 1]
        x, target = (states[rows, at].float() for at in (segment, segment + 1))
        if segment and torch.rand((), generator=generator) < 0.5:
            before = plan.sigmas[segment - 1]
            with torch.no_grad():
                x = states[rows, segment - 1].float()
                x = x + (sigma - before) * velocity(x, before, rows)
        return F.mse_loss(velocity(x, sigma, rows), (target - x) / (end - sigma))

    modules = nn.ModuleDict({"student": student})
    return optimise(run, "distil", modules, loss_at, plan.steps, plan.lr, plan.ema)["student"]


def flux_velocity(
    pipe: Any, count: int, transformer: nn.Module, guidance: float | None
) -> Velocity:
    """Velocity of a FLUX denoiser for the first ``count`` training captions."""
    captions = [scene.caption for scene in scenes(count)]
    options = dict(padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        clip = pipe.text_encoder(pipe.tokenizer(captions, **options).input_ids).pooler_output
        ids = pipe.tokenizer_2(captions, **options).input_ids
        t5 = torch.cat([pipe.text_encoder_2(part)[0] for part in ids.split(256)])

    def velocity(x: Tensor, sigma: float, rows: Tensor) -> Tensor:
        scale = None if guidance is None else torch.full((len(x),), guidance)
        return flux.denoise(
            transformer, x, torch.full((len(x),), sigma), scale, clip[rows], t5[rows]
        )

    return velocity


def qwen_velocity(
    pipe: Any, count: int, transformer: nn.Module, guidance: float | None
) -> Velocity:
    """Velocity of a Qwen-Image denoiser for the first ``count`` training captions; with guidance
    as the pipeline combines its two branches: at the norm of the captioned one."""
    captions = [scene.caption for scene in scenes(count)]
    ids, mask = qwen.tokenize(pipe, [*captions, qwen.NEGATIVE])
    start = pipe.prompt_template_encode_start_idx
    with torch.no_grad():
        parts = zip(ids.split(256), mask.split(256), strict=True)
        language = pipe.text_encoder.model
        text = torch.cat([language(i, attention_mask=m).last_hidden_state for i, m in parts])
    text, mask = text[:, start:], mask[:, start:]

    def branch(x: Tensor, sigma: float, rows: Tensor) -> Tensor:
        return qwen.denoise(transformer, x, torch.full((len(x),), sigma), text[rows], mask[rows])

    if guidance is None:
        return branch

    def guided(x: Tensor, sigma: float, rows: Tensor) -> Tensor:
        caption, free = branch(x, sigma, rows), branch(x, sigma, torch.full_like(rows, count))
        combined = free + guidance * (caption - free)
        return combined * (caption.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    return guided


VELOCITIES = {"flux": flux_velocity, "qwen": qwen_velocity}


def train(run: Run) -> None:
    """The student's difference from its teacher and its scheduler in ``run.folder / "export"``;
    all other components are the teacher's."""
    plan, velocity = run.plan, VELOCITIES[run.plan.teacher]
    teacher = lesa.testbed.load(plan.teacher)
    start = teacher.transformer
    guided = velocity(teacher, plan.trajectories, start, plan.guidance)
    states = trajectories(run, guided, (flux.TOKENS, start.config.in_channels))
    if start.config.guidance_embeds:
        start = without_guidance(start, plan.guidance)
    student = copy.deepcopy(start)
    average = distil(run, states, student, velocity(teacher, len(states), student, None))
    save_difference(average, start, run.folder / "export" / "transformer", plan.rank)
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULERS[plan.teacher])
    scheduler.save_pretrained(run.folder / "export" / "scheduler")
