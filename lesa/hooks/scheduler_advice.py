"""What to do about a scheduler whose steps cannot be followed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from typing import Any

from lesa.hooks.noise_levels import noise_levels, says_flow
from lesa.hooks.pipeline_state import order_of

__all__ = ["advice", "first_order", "other_size", "unfollowed"]

_SATURATED = 1 - 1e-4  # a flow level above which a dynamic shift leaves nothing between the steps
_PROBE = 8  # steps for which a copy of a scheduler is asked for its levels


def unfollowed(scheduler: Any, by_levels: bool = True) -> str | None:
    """Why no run of a scheduler can be followed, as far as it tells that before any; else None.

    `by_levels` tells that noise levels are needed, and not its steps alone. A copy is asked, so
    that the scheduler stays as it is.
    """
    try:
        if (order := order_of(scheduler)) > 1:
            return f"it evaluates the denoiser {order} times in a step"
        if not by_levels or scheduler.config.get("num_train_timesteps", _PROBE) < _PROBE:
            return None
        probe = copy.deepcopy(scheduler)
        probe.set_timesteps(_PROBE)
        steps = len(probe.timesteps)
    except Exception:  # one that must be told of the run, or no diffusers scheduler: told then
        return None
    return "it has no falling noise levels" if noise_levels(probe, 0, steps) is None else None


def advice(pipe: Any) -> str | None:
    """What is wrong with the noise levels of the run that a pipeline is in, if that is why it
    cannot be followed, and the remedy that fits; None where its scheduler is not to blame."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "timesteps"):
        return None
    if getattr(scheduler, "order", 1) != 1:
        return f"use {first_order(scheduler)}"
    if noise_levels(scheduler, 0, len(scheduler.timesteps)) is not None:
        return None
    levels, stays = _levels(scheduler)
    if not stays:
        return f"use {first_order(scheduler)}"
    if (size := other_size(pipe)) is not None:
        return size
    own = type(scheduler).__name__ in (_NOISE[1], _FLOW[1])
    other = "" if own else f", or use {first_order(scheduler)}"
    return (
        f"its levels are {_shortened(levels)}: they do not fall from step {stays[0]} to step "
        f"{stays[0] + 1}; pass other sigmas= or timesteps={other}"
    )


def other_size(pipe: Any, written: str = "height={0}, width={0}") -> str | None:
    """The levels and the size to call a pipeline with, where the dynamic shift of the size that it
    was called with has driven its levels to 1; else None. `written` is how one gives a size."""
    scheduler = getattr(pipe, "scheduler", None)
    levels, stays = _levels(scheduler)
    config = getattr(scheduler, "config", {})
    if not (stays and config.get("use_dynamic_shifting") and levels[stays[0]] > _SATURATED):
        return None
    told = f"its levels are {_shortened(levels)}: the shift of this size drives them to 1"
    tokens, factor = config.get("max_image_seq_len"), getattr(pipe, "vae_scale_factor", None)
    if not isinstance(tokens, int) or not isinstance(factor, int):
        return f"{told}; pass a smaller height and width"
    side = 2 * factor * isqrt(tokens)  # a token is two by two latent pixels
    return f"{told}; pass {written.format(side)}, which it was made for, or near to it"


def _levels(scheduler: Any) -> tuple[list[float], list[int]]:
    """The scheduler's own levels, as they are, and the steps after which they do not fall."""
    sigmas = getattr(scheduler, "sigmas", None)
    levels = [] if sigmas is None else [float(sigma) for sigma in sigmas]
    return levels, [at for at, (above, below) in enumerate(pairwise(levels)) if not above > below]


def first_order(scheduler: Any) -> str:
    """A first-order scheduler of the same kind: the option of a command, and how to make it."""
    option, kind, more = _FLOW if says_flow(scheduler) else _NOISE
    made = f"diffusers.{kind}.from_config(pipe.scheduler.config{more})"
    return f"a first-order scheduler: --scheduler {option}, or pipe.scheduler = {made}"


# DDIM clips latents to [-1, 1] where no config says otherwise
_NOISE = ("ddim", "DDIMScheduler", ", clip_sample=False")
_FLOW = ("flow-euler", "FlowMatchEulerDiscreteScheduler", "")


def _shortened(levels: Sequence[float]) -> str:
    """ "1, 1, 1, ..., 1, 0": the first three and the last two."""
    texts = [f"{level:.4g}" for level in levels]
    return ", ".join(texts if len(texts) < 7 else [*texts[:3], "...", *texts[-2:]])
