"""Noise levels in [0, 1]: the time that all schedulers share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lesa.errors import LesaError

__all__ = ["noise_levels", "own_noise_levels"]


def noise_levels(scheduler: Any, first: int, num_steps: int) -> tuple[float, ...] | None:
    """The `num_steps + 1` noise levels of a diffusers scheduler, from step `first` on.

    Flow time is taken as it is; a variance-preserving or EDM sigma becomes `sigma / (1 + sigma)`.
    None where the scheduler has no such levels or they do not strictly decrease.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    config = getattr(scheduler, "config", {})
    flow = (
        "FlowMatch" in type(scheduler).__name__
        or config.get("prediction_type") == "flow_prediction"
        or config.get("use_flow_sigmas", False)
    )
    levels = _values(sigmas) if sigmas is not None else _levels_of_alphas(scheduler)
    levels = levels[first : first + num_steps + 1]
    if len(levels) == num_steps:
        levels.append(0.0)
    if not flow:
        levels = [sigma / (1.0 + sigma) for sigma in levels]
    decreasing = all(a > b for a, b in pairwise(levels))
    return tuple(levels) if decreasing and len(levels) == num_steps + 1 > 1 else None


def _levels_of_alphas(scheduler: Any) -> list[float]:
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return []
    kept = alphas.cpu().double()[[int(time) for time in _values(scheduler.timesteps)]]
    return ((1 - kept) / kept).sqrt().tolist()


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
        if num_steps < 1:
            raise LesaError(f"num_inference_steps is {num_steps}: give at least 1.")
        return tuple(1.0 - i / num_steps for i in range(num_steps + 1))
    levels = tuple(float(sigma) for sigma in sigmas)
    if num_steps is not None and len(levels) != num_steps + 1:
        raise LesaError(
            f"sigmas has {len(levels)} values for {num_steps} steps: give {num_steps + 1}, "
            "the level at the start of each step and at the end."
        )
    inside = all(0.0 <= sigma <= 1.0 for sigma in levels)
    if len(levels) < 2 or not inside or any(a <= b for a, b in pairwise(levels)):
        raise LesaError(f"sigmas is {levels}: give strictly decreasing noise levels in [0, 1].")
    return levels
