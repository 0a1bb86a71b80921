"""What a pipeline and its scheduler tell of the loop that they are in."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lesa.errors import RunError

__all__ = ["executed_steps", "first_step", "guidance_parts", "order_of", "pipe_on_stack"]


def order_of(scheduler: Any) -> int:
    """Evaluations of the denoiser that a step takes.

    Raises RunError where the scheduler does not say so in a whole number.
    """
    order = getattr(scheduler, "order", 1)
    if not isinstance(order, int) or order < 1:
        raise RunError(
            f"scheduler: {type(scheduler).__name__}.order is {order!r}; it says how many "
            "evaluations a step takes: give 1, or 2 for Heun's method."
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


def executed_steps(pipe: Any, timesteps: Any, first: int) -> int:
    """Steps of this run: fewer than the scheduler's with img2img strength or `denoising_end`."""
    count = len(timesteps) - first
    told = getattr(pipe, "_num_timesteps", None)
    now = getattr(pipe, "_current_timestep", None)
    # Another pipeline may share the scheduler; the caller holds a view of its timesteps.
    is_caller = _is_view(now, timesteps) or not hasattr(pipe, "_current_timestep")
    return told if told and is_caller and told <= count else count


def guidance_parts(pipe: Any) -> int:
    """How many parts a call of the denoiser holds of every picture, where guidance is batched and
    their weighted sum is all that the sampler gets; else 1. Rescaled guidance gets more of them.
    """
    if getattr(pipe, "guidance_rescale", 0.0):
        return 1
    kinds = ("do_classifier_free_guidance", "do_perturbed_attention_guidance")
    return 1 + sum(bool(getattr(pipe, kind, False)) for kind in kinds)


def pipe_on_stack(known: list[Any]) -> Any:
    """The nearest pipeline whose `__call__` this thread is in: several may share the model."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if any(owner is pipe for pipe in known) or _is_pipe(owner):
                return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _is_pipe(owner: Any) -> bool:
    scheduler = getattr(owner, "scheduler", None)
    return not isinstance(owner, torch.nn.Module) and hasattr(scheduler, "timesteps")
