"""What a pipeline and its scheduler tell of the loop that they are in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch

from lesa.errors import RunError

__all__ = [
    "control_parts",
    "control_scale",
    "controls_of",
    "executed_steps",
    "first_step",
    "frame_times",
    "guidance_parts",
    "guidance_scales",
    "is_pipe",
    "order_of",
    "pictures_of",
]

# What diffusers' loops call the latents that they denoise.
_LATENTS = ("latents", "image", "images", "sample", "latent")
# Schedulers whose last time is the end of the last step, where nothing is evaluated.
_WITH_END = {"DDPMWuerstchenScheduler", "SCMScheduler"}
# What their calls call the scales of guidance, real and embedded.
_GUIDANCE = re.compile(r"(\w+_)?(guidance|cfg)_scale(_\d)?")
# What they call the scale that they give to a ControlNet at a step.
_SCALES = ("cond_scale", "controlnet_conditioning_scale")


def is_pipe(owner: Any) -> bool:
    """Whether this looks like a pipeline: it has a scheduler, and is no module."""
    scheduler = getattr(owner, "scheduler", None)
    return not isinstance(owner, torch.nn.Module) and hasattr(scheduler, "timesteps")


def order_of(scheduler: Any) -> int:
    """Evaluations of the denoiser that a step takes.

    Raises RunError where the scheduler does not say so in a whole number.
    """
    order = getattr(scheduler, "order", 1)
    if not isinstance(order, int) or order < 1:
        raise RunError(
            f"{type(scheduler).__name__}.order={order!r}: not how many evaluations a step takes; "
            "give 1, or 2 for Heun's method"
        )
    return order


def first_step(pipe: Any, scheduler: Any, timesteps: Any) -> int:
    """Where in `timesteps` this run begins: video-to-video pipelines do not tell the scheduler."""
    begin = getattr(scheduler, "begin_index", None)
    now: Any = getattr(pipe, "_current_timestep", None)
    if begin is not None or not _is_view(now, timesteps):
        return begin or 0
    first = now.storage_offset() - timesteps.storage_offset()
    return first if first + (getattr(pipe, "_num_timesteps", None) or 0) == len(timesteps) else 0


def _is_view(now: Any, timesteps: Any) -> bool:
    tensors = isinstance(now, torch.Tensor) and isinstance(timesteps, torch.Tensor)
    return tensors and now.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()


def frame_times(pipe: Any) -> torch.Tensor | None:
    """The times of the frames at this step, where a pipeline has one for each (diffusion forcing),
    one row of a matrix with a row for each step."""
    now = getattr(pipe, "_current_timestep", None)
    return now if isinstance(now, torch.Tensor) and now.ndim == 1 else None


def executed_steps(
    pipe: Any, scheduler: Any, timesteps: Any, first: int, *, calling: bool = True
) -> int:
    """Steps of this run: fewer than the scheduler's with img2img strength or `denoising_end`.

    `calling` tells that the pipeline's own loop is at work, whose count is of this run then.
    """
    told = getattr(pipe, "_num_timesteps", None)
    if told and frame_times(pipe) is not None:
        return told
    count = len(timesteps) - first - (type(scheduler).__name__ in _WITH_END)
    return told if told and calling and told <= count else count


def guidance_parts(pipe: Any, rows: int = 0, pictures: int = 0) -> int:
    """How many parts a call of the denoiser holds of every picture, where guidance is batched and
    their weighted sum is all that the sampler gets; else 1. Rescaled guidance gets more of them.

    Where `rows` of the batch that comes and `pictures` of the loop's latents are known, they tell
    of a part that the pipeline's flags leave out: InstructPix2Pix has three.
    """
    if getattr(pipe, "guidance_rescale", 0.0):
        return 1
    kinds = ("do_classifier_free_guidance", "do_perturbed_attention_guidance")
    told = 1 + sum(bool(getattr(pipe, kind, False)) for kind in kinds)
    real = rows // pictures if pictures and rows % pictures == 0 else 0
    return real if 1 < told == real - 1 else told


def guidance_scales(names: Mapping[str, Any], pipe: Any = None) -> dict[str, float]:
    """The scales of guidance among the arguments, or local variables, of a pipeline's call, and
    that of its guider if it has one."""
    found = {name: value for name, value in names.items() if _GUIDANCE.fullmatch(name)}
    guider = getattr(pipe, "guider", None)
    found |= {"guider.guidance_scale": getattr(guider, "guidance_scale", None)}
    return {name: scale for name, value in found.items() if (scale := _number(value)) is not None}


def _number(value: Any) -> float | None:
    """A number as a float, a tensor's on the CPU too; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def pictures_of(names: Mapping[str, Any]) -> int:
    """How many pictures the loop with these local variables makes at once; 0 if it cannot say."""
    for name in _LATENTS:
        found = names.get(name)
        if isinstance(found, torch.Tensor) and found.ndim > 2:
            return len(found)
    return 0


def controls_of(pipe: Any) -> Iterator[torch.nn.Module]:
    """The ControlNets that a pipeline holds now, under whatever name, one or several."""
    for part in control_parts(pipe).values():
        yield from part if isinstance(part, (list, tuple)) else (part,)


def control_parts(pipe: Any) -> dict[str, Any]:
    """The attributes of a pipeline that hold its ControlNets."""
    return {
        name: part
        for name, part in (vars(pipe).items() if hasattr(pipe, "__dict__") else ())
        if _is_control(name, part)
    }


def _is_control(name: str, part: Any) -> bool:
    modules = part if isinstance(part, (list, tuple)) else (part,)
    named = "controlnet" in name or any("ControlNet" in type(each).__name__ for each in modules)
    return named and bool(modules) and all(isinstance(each, torch.nn.Module) for each in modules)


def control_scale(names: Mapping[str, Any]) -> Any:
    """The scale of the step that a pipeline's call with these local variables is at, if it has
    one."""
    return next((names[name] for name in _SCALES if name in names), None)
