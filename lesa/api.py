"""Switch acceleration on and off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from os import PathLike
from typing import Any, Literal

from torch import nn

from lesa.core.checks import shown
from lesa.core.forecaster import Forecaster, Tap
from lesa.core.schedule import Schedule
from lesa.engine.config import LesaConfig
from lesa.engine.controller import CacheController
from lesa.engine.doubts import doubts
from lesa.engine.fit_to_model import check_model, controller_of, left_out, with_tap_of
from lesa.engine.predicted import PredictedController, form_of
from lesa.engine.stats import Stats
from lesa.errors import LesaError
from lesa.forecasters.guard import Mode
from lesa.forecasters.named import named
from lesa.forecasters.target import Quality
from lesa.hooks.attach import attach, attached, detach
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.pipeline import component_name, find_denoiser, find_denoisers
from lesa.hooks.step_clock import StepClock
from lesa.util.warn import warn

__all__ = [
    "accelerate",
    "apply_lesa_cache",
    "disable",
    "enable",
    "find_denoiser",
    "patch_diffusers",
    "remove_lesa_cache",
    "stats",
]


def enable(
    pipe: Any,
    forecaster: Forecaster | str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    full_steps: int | None = None,
    schedule: Schedule | None = None,
    target_speedup: float | None = None,
    target_psnr: float | None = None,
    quality: Quality | None = None,
    guard: Mode | None = None,
    tap: Tap | None = None,
    graph: Literal["auto", "off"] = "auto",
    memory_limit: int | None = None,
) -> None:
    """Accelerate a pipeline: most of its denoising steps are forecast from a few full ones.

    The pipeline is called as before. A second `enable` replaces the first. `forecaster` may also
    be a folder, a Hub id (at `revision`) or the name of a training-free method. See `LesaConfig`
    for the options and their defaults. A pipeline with two denoisers has both accelerated:
    outputs of one serve the other's forecasts, hidden features do not, since each has a tail of its
    own. One that the forecaster does not serve is left out, and named in the warning and in
    `stats`.

    Warns, once, where the forecaster was trained on other weights or for other numbers of full
    steps, or where the pipeline's scheduler cannot be followed.

    Raises:
        LesaError: an option is invalid, the denoiser is of an unknown class, the forecaster was
            made for another one, or another cache is enabled. Nothing has been changed then.
    """
    options: dict[str, Any] = {} if forecaster is None else {"forecaster": forecaster}
    if revision is not None:
        options = {"forecaster": _at_revision(forecaster, revision)}
    config = LesaConfig(
        full_steps=full_steps,
        schedule=schedule,
        target_speedup=target_speedup,
        target_psnr=target_psnr,
        quality=quality,
        guard=guard,
        tap=tap,
        graph=graph,
        memory_limit=memory_limit,
        **options,
    )
    found = find_denoisers(pipe)
    others = left_out(found, config)
    models = [model for model in found if model not in others]
    for model in models:
        check_model(model, config)
    config = with_tap_of(models[0], config)
    reasons = {component_name(pipe, model): reason for model, reason in others.items()}
    _warn(models, config, getattr(pipe, "scheduler", None), reasons)
    for model in others:
        detach(model)
    for group in [models] if config.resolved_tap == "output" else [[model] for model in models]:
        _install(group, config, pipe, reasons)


def disable(pipe: Any) -> None:
    """Make a pipeline (or a bare denoiser) what it was before `enable`; no effect if it is."""
    for model in find_denoisers(pipe):
        detach(model)


def stats(pipe: Any) -> Stats:
    """Full and skipped calls, fallbacks by reason, ring bytes and seconds since `enable`.

    Raises:
        LesaError: the pipeline is not accelerated.
    """
    models = find_denoisers(pipe)
    accelerated = [model for model in models if attached(model)] or models[:1]
    controllers = dict.fromkeys(controller_of(model) for model in accelerated)
    return Stats.joined([controller.stats() for controller in controllers])


@contextmanager
def accelerate(
    pipe: Any, forecaster: Forecaster | str | PathLike[str] | None = None, **options: Any
) -> Iterator[Any]:
    """`enable` for the length of a `with` block, which gets the pipeline; then as it was before."""
    with ExitStack() as stack:
        for model in find_denoisers(pipe):
            stack.callback(_put_back, model, attached(model))
        enable(pipe, forecaster, **options)
        yield pipe


def apply_lesa_cache(model: nn.Module, config: LesaConfig) -> None:
    """Accelerate a bare denoiser in one's own loop; replaces an earlier configuration.

    `config.scheduler`, or `config.num_inference_steps` with `config.sigmas`, tells the steps,
    unless the loop passes `step_index` and `num_inference_steps` to `model.cache_context`.

    Raises:
        LesaError: as `enable`; also a trained forecaster with steps but without noise levels.
    """
    if not isinstance(config, LesaConfig):
        raise LesaError(f"config={shown(config)}: not a configuration; give a lesa.LesaConfig")
    check_model(model, config)
    config = with_tap_of(model, config)
    _warn([model], config, config.scheduler)
    _install([model], config)


def remove_lesa_cache(model: nn.Module) -> None:
    """Undo `apply_lesa_cache`."""
    detach(model)


def patch_diffusers() -> None:
    """Let `model.enable_cache(LesaConfig(...))` work on every diffusers model with a cache API."""
    from diffusers.models.cache_utils import CacheMixin

    builtin = CacheMixin.enable_cache
    if hasattr(builtin, "_lesa_patch"):
        return

    @wraps(builtin)
    def enable_cache(self: Any, config: Any) -> None:
        if isinstance(config, LesaConfig) and not self.is_cache_enabled:
            apply_lesa_cache(self, config)
        else:
            builtin(self, config)

    enable_cache._lesa_patch = True  # type: ignore[attr-defined]
    CacheMixin.enable_cache = enable_cache


def _at_revision(source: Any, revision: str) -> Forecaster:
    """A trained forecaster of the Hub; LesaError where the source is no name."""
    if not isinstance(source, str):
        raise LesaError(
            f"revision={revision!r}: the forecaster is a {type(source).__name__}, and only a Hub "
            "repository ('owner/name') has revisions; leave it out"
        )
    return named(source, revision)


def _install(
    models: Sequence[nn.Module],
    config: LesaConfig,
    pipe: Any = None,
    left_out: Mapping[str, str] | None = None,
) -> None:
    """One clock and one controller for these models."""
    made = PredictedController if form_of(config) else CacheController
    clock, controller = _clock(config), made(config)
    controller.counters.set_left_out(left_out or {})
    for model in models:
        before = attached(model)
        if before is not None:
            for known in before.clock.pipes:
                clock.add_pipe(known)
            detach(model)
    if pipe is not None and pipe not in models:
        clock.add_pipe(pipe)
    for model in models:
        attach(model, controller, clock=clock, config=config)


def _put_back(model: nn.Module, before: Denoiser | None) -> None:
    """The controller that a model had before, or none."""
    detach(model)
    if before is not None:
        attach(model, before.controller, clock=before.clock, config=_shown(before))


def _warn(
    models: Sequence[nn.Module],
    config: LesaConfig,
    scheduler: Any,
    left_out: Mapping[str, str] | None = None,
) -> None:
    """All doubts in one warning, if there are any."""
    alone = [f"{name} is not accelerated: {why}." for name, why in (left_out or {}).items()]
    if found := [*alone, *doubts(models, config, scheduler)]:
        warn(" ".join(found))


def _clock(config: LesaConfig) -> StepClock:
    learned = hasattr(config.forecaster, "calibrated")
    told = config.sigmas is not None or config.scheduler is not None
    if learned and config.num_inference_steps is not None and not told:
        raise LesaError(
            f"sigmas=None: the trained forecaster {config.forecaster.name} needs the noise levels "
            "of the loop; give sigmas=... or scheduler=... in the LesaConfig"
        )
    return StepClock(
        scheduler=config.scheduler, num_steps=config.num_inference_steps, sigmas=config.sigmas
    )


def _shown(denoiser: Denoiser) -> object:
    return getattr(denoiser.controller, "config", None)
