"""Pipelines with random weights, and training jobs on them, for the tests of training."""

from __future__ import annotations

import torch
from tiny_pipelines import build, wan_22

from lesa.training.job import Job

STEPS = 6
GUIDANCE = 4.0
TWO_CALLS, BATCHED = ("qwen", "hunyuan-video", "chroma"), ("sdxl", "sd3")


def make(name, prompts=2, **more):
    """A pipeline and a call of it with embeddings that differ from prompt to prompt."""
    pipe, call = wan_22() if name == "wan-2.2" else build(name)
    arguments = call(prompts)
    for key in ("num_inference_steps", "generator", "output_type"):
        del arguments[key]
    draw = torch.Generator().manual_seed(1)
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            arguments[key] = value + 0.5 * torch.randn(value.shape, generator=draw)
    plain = name in (*BATCHED, "chroma", "pixart", "sana", "wan-2.2", "z-image")
    scale = "guidance_scale" if plain else "true_cfg_scale"
    return pipe, {**arguments, scale: GUIDANCE, **more}


def make_job(name, prompts=2, **more):
    pipe, call = make(name, prompts, **more)
    return Job(pipe, [f"prompt {i}" for i in range(prompts)], call)


def decibels(plain, fast):
    """dB of each picture: the mean square of the plain one over that of the difference."""
    plain, fast = plain.double().flatten(1), fast.double().flatten(1)
    return -10 * torch.log10((plain - fast).square().mean(1) / plain.square().mean(1))


def reuse(width):
    def rows(schedule, sigmas, branch):
        table = torch.zeros(schedule.num_steps, width, dtype=torch.float64)
        table[list(schedule.skipped_steps), 0] = 1
        return table

    return rows
