"""DBCache as the package cache-dit maintains it: by threshold, with its Taylor calibrator, or by a
mask of steps. Source: https://github.com/vipshop/cache-dit (Apache-2.0), lazily imported."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Origin, Peer, Use
from lesa.evaluation.peers.diffusers_caches import calls_in_a_step
from lesa.evaluation.peers.metering import blocks_of, metered, restored
from lesa.evaluation.peers.thresholds import Applied, adaptive, needs_calibration

_FIRST_BLOCKS = 8 / 57  # F8 of FLUX.1's blocks
_WARMUP = 8  # published for 28 to 50 steps
_GAPS = (2, 5, 6, 7)  # cached steps between the single full ones in the mask "ultra"


@dataclass(frozen=True)
class DBCache:
    """The first n blocks run at every step; where their residual has changed by more than a
    threshold (relative L1), or in the first steps, the others run too. Else their last residual is
    added (`order` 0), or its Taylor series of an order in the steps.

    masked: the full steps are a list instead, and no change is looked at.
    """

    order: int = 0
    masked: bool = False

    @property
    def takes_lists(self) -> bool:
        """A mask is a list."""
        return self.masked

    def unfit(self, bench: Bench) -> str | None:
        """It needs its package, an adapter for the pipeline, and prompts for the threshold and to
        see whether guidance is a call of its own."""
        if find_spec("cache_dit") is None:
            return "needs the package cache-dit; run pip install '.[eval]'"
        model = getattr(bench.pipe, "transformer", None)
        if model is None or not _has_adapter(bench.pipe):
            return f"needs an adapter of cache-dit for {type(bench.pipe).__name__}; leave it out"
        if len(blocks_of(model)) < 2:
            return "needs two transformer blocks; leave it out"
        return needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The threshold with at least `wanted` full steps on the calibration prompts; of a mask,
        exactly that many, as in the package's mask "ultra", or the given list."""
        steps = bench.num_steps
        applied = partial(
            dbcache, num_steps=steps, order=self.order, two_calls=calls_in_a_step(bench) > 1
        )
        if self.masked:
            schedule = searched or Schedule.explicit(mask_steps(wanted, steps), steps)
            schedule = schedule.bind(steps)
            mask = [int(step in schedule.full_steps) for step in range(steps)]
            origin: Origin = "own" if searched is None else "searched"
            return Method(name, steps, None, schedule, origin, applied=partial(applied, mask=mask))

        def by_threshold(threshold: float) -> Applied:
            warmup = min(_WARMUP, max(1, wanted // 2))
            return partial(applied, threshold=threshold, warmup=warmup)

        return adaptive(name, wanted, bench, by_threshold)


DBCACHES: dict[str, Peer] = {
    "dbcache": DBCache(),
    "dbcache-taylor": DBCache(order=1),
    "dbcache-scm": DBCache(masked=True),
    "dbcache-scm-taylor": DBCache(order=1, masked=True),
}


def mask_steps(wanted: int, num_steps: int) -> list[int]:
    """Full steps like those of cache-dit's mask "ultra" (8 of 28: 0-3, 6, 12, 19, 27): half of them
    at the start, then single ones in growing gaps, the last step among them."""
    lead = (wanted + 1) // 2
    single = wanted - lead
    gaps = np.interp(np.linspace(0, len(_GAPS) - 1, single), range(len(_GAPS)), _GAPS)
    ends = np.cumsum(gaps) / max(gaps.sum(), 1) * (num_steps - wanted)
    return [*range(lead), *(lead + round(end) + i for i, end in enumerate(ends))]


@contextmanager
def dbcache(
    pipe: Any,
    num_steps: int,
    threshold: float = 0.0,
    warmup: int = _WARMUP,
    order: int = 0,
    mask: Sequence[int] | None = None,
    two_calls: bool = False,
) -> Iterator[Use]:
    """DBCache of the package cache-dit on a pipeline for a while: F n B 0, with n of 8 in 57.

    num_steps: of one generation. warmup: steps at its start that are full. order: of the Taylor
    calibrator, 0 without. mask: 1 for each full step; then no threshold is looked at. two_calls:
    guidance is a call of its own, after the prompt's. On a pipeline the package makes its context
    anew for every call, so nothing of one generation enters the next (on a bare transformer
    `cache_dit.refresh_context` would have to be called between them). The pipeline and its class
    are as before afterwards.
    """
    import cache_dit

    model = pipe.transformer
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=max(1, round(_FIRST_BLOCKS * len(blocks_of(model)))),
        residual_diff_threshold=threshold,
        max_warmup_steps=warmup,
        steps_computation_mask=None if mask is None else list(mask),
        steps_computation_policy="static",
        enable_separate_cfg=two_calls,
    )
    calibrator = None
    if order:
        calibrator = cache_dit.TaylorSeerCalibratorConfig(
            taylorseer_order=order, enable_encoder_calibrator=_returns_text(model)
        )
    with enabled(pipe, num_steps, cache_config=config, calibrator_config=calibrator) as use:
        yield use


@contextmanager
def enabled(pipe: Any, num_steps: int, **configs: Any) -> Iterator[Use]:
    """`cache_dit.enable_cache(pipe, **configs)` for a while; as it was before afterwards."""
    import cache_dit

    model = pipe.transformer
    with restored(model):
        try:
            with _quiet():
                cache_dit.enable_cache(pipe, **configs)
            with metered(model, partial(_held, model), num_steps) as use:
                yield use
        finally:
            with _quiet():
                cache_dit.disable_cache(pipe)


def _has_adapter(pipe: Any) -> bool:
    from cache_dit import BlockAdapterRegister  # takes seconds, so not without a transformer

    return BlockAdapterRegister.is_supported(pipe)


def _returns_text(model: Any) -> bool:
    """Whether the last block returns the text too: where it drops it, as that of
    Stable Diffusion 3, the package's calibrator of the text would be asked for what it never got.
    """
    return not getattr(blocks_of(model)[-1], "context_pre_only", False)


def _held(model: Any) -> list[Any]:
    """What the contexts of a cached transformer keep: buffers, and the calibrators' terms."""
    contexts = model._context_manager._cached_context_manager.values()
    kept: list[Any] = [context.buffers for context in contexts]
    for context in contexts:
        for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
            kept += [state.state for state in calibrator.states.values()] if calibrator else []
    return kept


@contextmanager
def _quiet() -> Iterator[None]:
    """The package logs every adapter that it puts on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
