"""What the tests of user actions share: a fresh pipeline to compare with, and a disturbed run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tiny_pipelines import run

import lesa
from lesa.hooks.attach import attached

Calls = Callable[..., dict[str, Any]]


def fresh(pipe: Any) -> Any:
    """A copy of the pipeline with the same weights, enabled in the same way, with no past."""
    denoiser = attached(lesa.api.find_denoiser(pipe))
    clone = copy.deepcopy(pipe)
    clone.set_progress_bar_config(disable=True)
    if denoiser is not None:
        config = denoiser.controller.config
        schedule, tap = config.schedule, config.resolved_tap
        lesa.enable(clone, config.forecaster, schedule=schedule, tap=tap)
    return clone


def plain(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """The output of the same pipeline without lesa."""
    clone = copy.deepcopy(pipe)
    clone.set_progress_bar_config(disable=True)
    return run(clone, arguments)


def check_nothing_stale(pipe: Any, call: Calls, **options: Any) -> torch.Tensor:
    """A run equals that of a fresh pipeline, bit for bit."""
    found = run(pipe, call(**options))
    assert torch.equal(found, run(fresh(pipe), call(**options)))
    return found


def at_step(number: int, action: Callable[[Any, dict[str, Any]], Any]) -> Callable[..., Any]:
    """A `callback_on_step_end` that does something once: `action(pipe, values)`."""

    def callback(pipe: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        return (action(pipe, values) if index == number else None) or {}

    return callback


def new_fallbacks(pipe: Any, arguments: dict[str, Any]) -> dict[str, int]:
    """The fallbacks, by reason, of one run."""
    before = lesa.stats(pipe).fallbacks
    run(pipe, arguments)
    after = lesa.stats(pipe).fallbacks
    return {why: n - before.get(why, 0) for why, n in after.items() if n > before.get(why, 0)}
