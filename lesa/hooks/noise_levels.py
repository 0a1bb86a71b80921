"""Noise levels in [0, 1]: the time that all schedulers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lesa.core.checks import MOST_STEPS, reals, shown, whole
from lesa.errors import LesaError

__all__ = ["levels_problem", "noise_levels", "own_noise_levels", "says_flow", "times_of"]


_ROUNDING = 1e-6


def noise_levels(scheduler: Any, first: int, num_steps: int) -> tuple[float, ...] | None:
    """The `num_steps + 1` noise levels of a diffusers scheduler, from step `first` on.

    Flow time is taken as it is, or its complement where the scheduler inverts it; the ratio of
    noise to signal becomes `ratio / (1 + ratio)`, so that pure noise (zero terminal SNR) is 1. A
    last level that repeats the one before, which no step is forecast at, becomes 0. None where the
    scheduler has no levels or they do not strictly decrease: see `levels_problem`.
    """
    levels = _mapped(scheduler, first, num_steps)
    return tuple(levels) if _problem(levels, num_steps) is None else None


def levels_problem(scheduler: Any, first: int, num_steps: int) -> str | None:
    """Why there are no `noise_levels`, in a few words; None where there are."""
    problem = _problem(_mapped(scheduler, first, num_steps), num_steps)
    return problem and f"the noise levels of {type(scheduler).__name__} {problem}"


def times_of(scheduler: Any, first: int, num_steps: int) -> tuple[float, ...]:
    """The scheduler's own times of the steps, which tell one run from another without levels."""
    return tuple(_values(scheduler.timesteps)[first : first + num_steps])


def _mapped(scheduler: Any, first: int, num_steps: int) -> list[float]:
    """The levels of the run's steps and of its end, as they come; empty where there are none."""
    sigmas, config = getattr(scheduler, "sigmas", None), getattr(scheduler, "config", {})
    given = _ratios(scheduler) if sigmas is None else _values(sigmas)
    if sigmas is not None and _is_flow(scheduler, given):
        levels = [1.0 - sigma for sigma in given] if config.get("invert_sigmas") else given
    else:
        levels = [1.0 if math.isinf(ratio) else ratio / (1.0 + ratio) for ratio in given]
    if not 0 <= len(levels) - len(scheduler.timesteps) <= 1:  # not those of this run
        return []
    levels = levels[first : first + num_steps + 1]
    if len(levels) == num_steps:
        levels.append(0.0)
    elif len(levels) == num_steps + 1 > 2 and levels[-1] == levels[-2]:
        levels[-1] = 0.0
    return levels


def _problem(levels: Sequence[float], num_steps: int) -> str | None:
    if len(levels) != num_steps + 1 or num_steps < 1:
        return "are not known"
    if not all(-_ROUNDING <= level <= 1.0 + _ROUNDING for level in levels):
        return "leave the range from 0 to 1"
    if all(a > b for a, b in pairwise(levels)):
        return None
    return "rise" if any(a < b for a, b in pairwise(levels)) else "repeat"


def _is_flow(scheduler: Any, sigmas: Sequence[float]) -> bool:
    """Whether a sigma is the share of noise in a straight mixture, not its ratio to the signal."""
    ratio = hasattr(scheduler, "alphas_cumprod") or "sigma_data" in getattr(scheduler, "config", {})
    return says_flow(scheduler) or not (ratio or max(sigmas, default=2) > 1)


def says_flow(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is one of flow matching, by its class and its configuration."""
    config = getattr(scheduler, "config", {})
    told = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return bool(told) or "FlowMatch" in type(scheduler).__name__


def _ratios(scheduler: Any) -> list[float]:
    """Noise to signal at each of the times of a scheduler without sigmas."""
    times = _values(scheduler.timesteps)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is not None:
        known = alphas.cpu().double()
        if not all(0 <= time < len(known) for time in times):
            return []
        kept = known[[int(time) for time in times]]
        return ((1 - kept) / kept).sqrt().tolist()
    angle = _ANGLES.get(type(scheduler).__name__)
    return [] if angle is None else [_tangent(angle * time) for time in times]


# Of schedulers whose times are angles between signal and noise: radians in their unit.
_ANGLES = {"SCMScheduler": 1.0, "IPNDMScheduler": math.pi / 2}


def _tangent(angle: float) -> float:
    return math.inf if angle > math.pi / 2 - 1e-4 else math.tan(angle)


class _Read(NamedTuple):
    """What a tensor held when it was last read, and what tells that it may hold something else."""

    state: tuple[int, int]
    values: list[float]


_reads: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by identity


def _values(source: Any) -> list[float]:
    """The values of a tensor, array or list.

    A tensor on a device is waited for once, as long as it is the same object and nobody writes to
    it: that is once per `set_timesteps`, which makes a new one. On the host anybody may share its
    memory, and reading it costs nothing: it is read every time. So is an inference tensor, which
    does not count what is written to it.
    """
    if not isinstance(source, Tensor):
        return [float(value) for value in source]
    if source.device.type == "cpu" or source.is_inference():
        return source.tolist()
    state, known = (source._version, source.data_ptr()), _reads.get(source)
    if known is None or known.state != state:
        known = _reads[source] = _Read(state, source.tolist())
    return known.values


def own_noise_levels(num_steps: int | None, sigmas: Sequence[float] | None) -> tuple[float, ...]:
    """Noise levels of one's own loop, evenly spaced if only `num_steps` is given, else empty.

    Raises:
        LesaError: they do not strictly decrease within [0, 1], or their number is wrong.
    """
    if sigmas is None:
        if num_steps is None:
            return ()
        num_steps = whole("num_inference_steps", num_steps, 1, MOST_STEPS)
        return tuple(1.0 - i / num_steps for i in range(num_steps + 1))
    levels = reals("sigmas", sigmas, "give noise levels in [0, 1]")
    if num_steps is not None and len(levels) != num_steps + 1:
        raise LesaError(
            f"sigmas={shown(levels)}: {len(levels)} values for {num_steps} steps; give "
            f"{num_steps + 1}, the level at the start of each step and at the end"
        )
    inside = all(0.0 <= sigma <= 1.0 for sigma in levels)
    if len(levels) < 2 or not inside or any(a <= b for a, b in pairwise(levels)):
        raise LesaError(
            f"sigmas={shown(levels)}: not strictly decreasing in [0, 1]; give such noise levels"
        )
    return levels
