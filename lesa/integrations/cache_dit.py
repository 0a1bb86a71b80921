"""lesa inside cache-dit 1.5: its block adapters and contexts, lesa's steps and coefficients.

    cache_dit.enable_cache(pipe, **lesa.integrations.cache_dit.configs(pipe, "my-lesa"))

The first block runs at every step and nothing behind the others (F1 B0). What the last block
returns is forecast, which is lesa's hidden tap: the pictures are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lesa.core.schedule import Schedule
from lesa.engine.config import LesaConfig
from lesa.errors import LesaError
from lesa.hooks.generation import Generation
from lesa.hooks.pipeline import find_denoiser
from lesa.integrations.stream import Plan, Stream, run_of

__all__ = ["Calibrator", "configs"]

_SERIES = "1.5"


def configs(
    pipe: Any, forecaster: Any = None, *, separate_cfg: bool | None = None, **options: Any
) -> dict[str, Any]:
    """The arguments of `cache_dit.enable_cache(pipe, ...)`, which `disable_cache(pipe)` undoes.

    Args:
        pipe: a diffusers pipeline that cache-dit has an adapter for.
        forecaster: as for `lesa.enable`, made for the hidden tap or for any.
        separate_cfg: whether guidance is a call of its own after the prompt's; what cache-dit
            knows of the pipeline if None.
        options: `full_steps`, `schedule` or a target, as for `lesa.enable`. They are read anew
            in every run, so that its number of steps and its size may vary.

    Raises:
        LesaError: cache-dit is not there or another one, it has no adapter for the pipeline, or
            the forecaster does not fit.
    """
    package = _package()
    if not hasattr(pipe, "scheduler") or not package.BlockAdapterRegister.is_supported(pipe):
        raise LesaError(
            f"pipe: cache-dit {_SERIES} has no adapter for a {type(pipe).__name__}; "
            "use lesa.enable(pipe), which needs none"
        )
    if forecaster is not None:
        options["forecaster"] = forecaster
    config = LesaConfig(**options)
    own = config.forecaster.tap
    if own == "output" or config.forecaster.uses_latent:
        raise LesaError(
            f"forecaster {config.forecaster.name!r}: it was made for the output tap, cache-dit "
            "keeps what the blocks return; train one with tap='hidden'"
        )
    config = LesaConfig(**options | {"forecaster": config.forecaster, "tap": "hidden"})
    if hasattr(config.forecaster, "check_model"):
        config.forecaster.check_model(type(find_denoiser(pipe)).__name__, tap="hidden")
    if separate_cfg is None:
        separate_cfg = package.BlockAdapterRegister.has_separate_cfg(pipe)
    source = _Source(pipe, Plan(config), bool(separate_cfg))
    _install()
    return {
        "cache_config": package.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            residual_diff_threshold=1.0,
            steps_computation_mask=_Mask(source),
            steps_computation_policy="static",
            enable_separate_cfg=source.separate_cfg,
        ),
        "calibrator_config": package.caching.CalibratorConfig(
            enable_calibrator=True,
            calibrator_type="lesa",
            calibrator_cache_type="hidden_states",
            calibrator_kwargs={"source": source},
        ),
    }


class _Shared:
    """What all contexts of a pipeline share: cache-dit copies its configurations deeply."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class _Source(_Shared):
    """The run that a pipeline is in, for all its calibrators."""

    def __init__(self, pipe: Any, plan: Plan, separate_cfg: bool) -> None:
        self.plan, self.separate_cfg = plan, separate_cfg
        self.schedule: Schedule | None = None
        self._pipe, self._run, self._made = weakref.ref(pipe), Generation(), 0

    def begin(self) -> None:
        """At step 0, before the mask is asked: read the run from the pipeline's scheduler."""
        pipe: Any = self._pipe()
        if self.schedule is None or self._run.timesteps is not pipe.scheduler.timesteps:
            self._run = run_of(pipe.scheduler, pipe)
            self.schedule = self.plan.schedule(self._run)

    def check(self, step: int) -> None:
        """LesaError where the loop is at another step than the calls that were counted tell."""
        scheduler: Any = getattr(self._pipe(), "scheduler", None)
        place = getattr(scheduler, "step_index", None)
        if place is not None and place - self._run.first != step:
            other = not self.separate_cfg
            raise LesaError(
                f"separate_cfg={self.separate_cfg}: after {step} calls the loop is at step "
                f"{place - self._run.first}; pass separate_cfg={other}"
            )

    def stream(self, branch: str) -> Stream:
        """An empty one for the run."""
        return self.plan.stream(self._run, branch)

    def calibrator(self) -> Calibrator:
        """Of one list of blocks. A context makes one for the prompt and, where guidance is a call
        of its own, a second one for that."""
        self._made += 1
        return Calibrator(self, "uncond" if self.separate_cfg and not self._made % 2 else "cond")


class _Mask(_Shared, Sequence[int]):
    """The steps that cache-dit computes, 1 for each full one, of the run that the source is in."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def __len__(self) -> int:
        schedule = self._source.schedule
        return 0 if schedule is None else schedule.steps

    def __getitem__(self, step: Any) -> Any:
        schedule = self._source.schedule
        if schedule is None or not 0 <= step < schedule.steps:
            raise IndexError(step)
        return int(schedule.is_full(step))

    def __iter__(self) -> Iterator[int]:
        return (self[step] for step in range(len(self)))


class Calibrator:
    """What cache-dit asks of a calibrator, answered from lesa's table; a stream for each name."""

    def __init__(self, source: _Source, branch: str) -> None:
        self._source, self._branch = source, branch
        self.reset_cache()

    def reset_cache(self) -> None:
        """A generation begins."""
        self._step, self.streams = -1, dict[str, Stream]()

    def mark_step_begin(self) -> None:
        """The next step begins; LesaError at the first one if the run does not fit."""
        self._step += 1
        if not self._step:
            self._source.begin()
        self._source.check(self._step)

    def update(self, Y: Tensor, name: str = "default") -> None:
        """Take what the last block returned at a full step."""
        stream = self.streams.get(name)
        if stream is None:
            stream = self.streams[name] = self._source.stream(self._branch)
        stream.keep(self._step, Y)

    def approximate(self, name: str = "default") -> Tensor:
        """What it would return at a skipped one."""
        return self.streams[name].forecast(self._step)

    def __repr__(self) -> str:
        return f"{self._source.plan.config.forecaster.name}, {self._branch}"


class _Factory:
    """cache-dit's list of calibrators is closed: this one knows lesa too."""

    def __init__(self, known: Any) -> None:
        self._known = known

    def __call__(self, calibrator_config: Any) -> Any:
        if calibrator_config.calibrator_type != "lesa":
            return self._known(calibrator_config)
        return calibrator_config.calibrator_kwargs["source"].calibrator()


def _install() -> None:
    from cache_dit.caching.cache_contexts import cache_context

    if not isinstance(cache_context.Calibrator, _Factory):
        cache_context.Calibrator = _Factory(cache_context.Calibrator)


def _package() -> Any:
    try:
        import cache_dit
        import cache_dit.caching
    except ImportError as error:
        raise LesaError(f"cache-dit: {error}; run pip install 'cache-dit>=1.5.3,<1.6'") from None
    if not cache_dit.__version__.startswith(f"{_SERIES}."):
        raise LesaError(
            f"cache-dit={cache_dit.__version__}: lesa knows the contexts of {_SERIES}; "
            "run pip install 'cache-dit>=1.5.3,<1.6'"
        )
    return cache_dit
