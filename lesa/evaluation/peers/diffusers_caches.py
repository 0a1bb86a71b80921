"""The caches that diffusers ships, as they are: enabled on the transformer, metered, undone."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from statistics import fmean
from typing import Any

from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Method, Peer, Use
from lesa.evaluation.peers.diffusers_support import (
    nameless_calls,
    silent_pipeline,
    uncacheable,
    unknown_blocks,
)
from lesa.evaluation.peers.metering import metered, restored
from lesa.evaluation.peers.thresholds import (
    Applied,
    adaptive,
    mean_full_steps,
    needs_calibration,
)
from lesa.evaluation.runs import step_flops
from lesa.hooks.prompt_inputs import settings_of

_BROADCASTS = (9, 7, 5, 3, 2)  # the attention ranges of PAB 579 and 235


@dataclass(frozen=True)
class Adaptive:
    """A cache that compares a change with a threshold: full steps fall where it is exceeded.

    config: the diffusers class. options: its arguments beside the threshold. suited: why it cannot
    run on a transformer that diffusers can cache.
    """

    config: str
    options: Callable[[int, Bench], dict[str, Any]]
    suited: Callable[[Bench], str | None]

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It needs a model that diffusers' hooks know, and prompts for the threshold."""
        return uncacheable(bench) or self.suited(bench) or needs_calibration(bench)

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The threshold with at least `wanted` full steps on the calibration prompts."""
        options = self.options(wanted, bench)

        def applied(threshold: float) -> Applied:
            config = partial(_make, self.config, threshold=threshold, **options)
            return partial(cached, configure=config, num_steps=bench.num_steps)

        return adaptive(name, wanted, bench, applied)


@dataclass(frozen=True)
class TaylorLite:
    """TaylorSeer (arXiv 2503.06923) in diffusers' lite mode: no block runs on a skipped step, and
    the output of the last projection is a Taylor series of order 1.

    Full are the steps 0, 1, 2 and 4, 4 + N, 4 + 2 N, ...
    """

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It needs a cacheable transformer whose last module is `proj_out`, and named calls."""
        if (reason := uncacheable(bench)) is not None:
            return reason
        if hasattr(bench.pipe.transformer, "proj_out"):
            return nameless_calls(bench)
        return "needs a transformer that ends in proj_out; leave it out"

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The interval with the fewest full steps that are not below `wanted`."""
        steps = bench.num_steps
        lists = {n: _taylor_steps(n, steps) for n in range(1, steps + 1)}
        enough = (n for n in lists if len(lists[n]) >= wanted)
        interval = min(enough, key=lambda n: (len(lists[n]), n))
        config = partial(
            _make,
            "TaylorSeerCacheConfig",
            cache_interval=interval,
            use_lite_mode=True,
            taylor_factors_dtype=bench.pipe.transformer.dtype,
        )
        applied = partial(cached, configure=config, num_steps=steps)
        schedule = Schedule.explicit(lists[interval], steps)
        return Method(name, steps, None, schedule, applied=applied)


@dataclass(frozen=True)
class Broadcast:
    """Attention outputs are reused, all else runs at every step: equal work is equal FLOPs.

    config: the diffusers class; options: its arguments beside the range.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)

    takes_lists = False

    def unfit(self, bench: Bench) -> str | None:
        """It needs prompts for the choice of the range, and one call of the model per step."""
        reason = uncacheable(bench) or needs_calibration(bench)
        if reason is None and calls_in_a_step(bench) > 1:
            return "keeps one state for both guidance calls in diffusers; leave it out"
        return reason

    def build(self, name: str, wanted: int, bench: Bench, searched: Schedule | None) -> Method:
        """The published range whose FLOPs are nearest to those of `wanted` full steps."""
        steps, shares = bench.num_steps, {}
        whole = _flops(bench, 1) * steps
        for interval in _BROADCASTS:
            with self._applied(interval, steps)(bench.pipe):
                shares[interval] = _flops(bench, steps) / whole
            if shares[interval] >= wanted / steps:
                break  # a shorter range costs more
        best = min(shares, key=lambda n: (abs(shares[n] - wanted / steps), n))
        note = f"attention reused in runs of {best}, {shares[best]:.0%} of the plain run's FLOPs"
        return Method(name, steps, applied=self._applied(best, steps), wanted=wanted, note=note)

    def _applied(self, interval: int, num_steps: int) -> Applied:
        def config(pipe: Any) -> Any:
            return _make(
                self.config,
                pipe,
                spatial_attention_block_skip_range=interval,
                current_timestep_callback=lambda: pipe.current_timestep,
                **self.options,
            )

        return partial(cached, configure=config, num_steps=num_steps)


@contextmanager
def cached(pipe: Any, configure: Callable[[Any], Any], num_steps: int) -> Iterator[Use]:
    """A cache of diffusers on `pipe.transformer` for a while.

    configure: pipeline -> the config for `enable_cache`. num_steps: of one generation, for the
    count of full steps per guidance branch. The transformer is as before afterwards.
    """
    model = pipe.transformer
    with restored(model):
        model.enable_cache(configure(pipe))
        try:
            with metered(model, _states(model), num_steps) as use:
                yield use
        finally:
            model.disable_cache()


def _make(config: str, pipe: Any, **options: Any) -> Any:
    import diffusers

    return getattr(diffusers, config)(**options)


def _states(model: Any) -> Callable[[], Any]:
    """What the hooks of diffusers keep: the attributes of their states, by module."""
    registries = [part.__dict__.get("_diffusers_hook") for part in model.modules()]
    hooks = [hook for one in registries if one is not None for hook in one.hooks.values()]
    managers = [hook.state_manager for hook in hooks if hasattr(hook, "state_manager")]
    single = [hook.state for hook in hooks if hasattr(hook, "state")]

    def held() -> list[dict[str, Any]]:
        kept = [state for manager in managers for state in manager._state_cache.values()]
        return [vars(state) for state in (*kept, *single)]

    return held


def _taylor_steps(interval: int, num_steps: int) -> list[int]:
    return [s for s in range(num_steps) if s < 3 or (s - 4) % interval == 0]


def _magnitude(wanted: int, bench: Bench) -> dict[str, Any]:
    """Published: a fifth of the steps retained at the start, 3 skipped in a row at most. Where this
    cannot get down to `wanted`, half of the full steps are retained and the threshold decides."""
    steps = bench.num_steps
    retained = round(0.2 * steps)
    published = retained + (steps - retained) // 4 <= wanted
    return {
        "retention_ratio": 0.2 if published else 0.5 * wanted / steps,
        "max_skip_steps": 3 if published else steps,
        "num_inference_steps": steps,
        "mag_ratios": magnitude_ratios(bench),
    }


def magnitude_ratios(bench: Bench) -> list[float]:
    """MagCache's own calibration: the ratio of the residual's norm to that of the step before,
    [steps], mean over tokens, guidance branches and a few calibration prompts."""
    config = partial(_make, "MagCacheConfig", num_inference_steps=bench.num_steps, calibrate=True)
    with redirect_stdout(StringIO()) as printed:  # diffusers prints the ratios, and drops them
        mean_full_steps(bench, partial(cached, configure=config, num_steps=bench.num_steps))
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    return [fmean(column) for column in zip(*map(literal_eval, lines), strict=True)]


def _spectral(wanted: int, bench: Bench) -> dict[str, Any]:
    """Published: 2 skipped in a row at most, which `wanted` may rule out; 0 is any number."""
    return {"max_consecutive_cached": 2 if bench.num_steps // 3 + 2 <= wanted else 0}


def calls_in_a_step(bench: Bench) -> int:
    """How often the pipeline calls its transformer in one step."""
    calls = 0

    def called(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = bench.pipe.transformer.register_forward_hook(called)
    try:
        _flops(bench, 1)
    finally:
        handle.remove()
    return calls


def _flops(bench: Bench, steps: int) -> int:
    """Floating-point operations of the first steps for one calibration prompt."""
    own = settings_of(bench.settings, [0], len(bench.calibration))
    own["num_inference_steps"] = bench.num_steps
    return sum(step_flops(bench.pipe, bench.calibration[0], own, steps))


# FirstBlockCache: relative L1 change of the first block's residual. MagCache (arXiv 2506.09045):
# calibrated growth of the whole residual, summed. SeaCache (arXiv 2602.18993): change of the
# latent, filtered to what is signal at its noise level. FasterCache (arXiv 2410.19355): attention
# extrapolated with diffusers' weight. PAB (arXiv 2408.12588): attention as it was.
CACHES: dict[str, Peer] = {
    "fbcache": Adaptive(
        "FirstBlockCacheConfig",
        lambda *_: {},
        lambda bench: unknown_blocks(bench) or nameless_calls(bench),
    ),
    "magcache": Adaptive("MagCacheConfig", _magnitude, unknown_blocks),
    "taylorseer-diffusers": TaylorLite(),
    "fastercache": Broadcast(
        "FasterCacheConfig",
        {"is_guidance_distilled": True, "attention_weight_callback": lambda _: 0.5},
    ),
    "pab": Broadcast("PyramidAttentionBroadcastConfig"),
    "seacache": Adaptive("SeaCacheConfig", _spectral, silent_pipeline),
}
