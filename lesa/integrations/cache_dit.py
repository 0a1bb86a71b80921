"""lesa inside cache-dit 1.5: its block adapters and contexts, lesa's steps and coefficients.

    cache_dit.enable_cache(pipe, **lesa.integrations.cache_dit.configs(pipe, "my-lesa"))

Of every list of blocks the first one runs at every step and nothing behind the others (F1 B0).
What the last one returns is forecast, lesa's hidden tap: the pictures are the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lesa.errors import LesaError
from lesa.hooks.generation import Generation
from lesa.hooks.pipeline import find_denoiser
from lesa.integrations.engines import engine
from lesa.integrations.stream import Plan, Stream, hidden_config, run_of

__all__ = ["Calibrator", "configs"]


def configs(
    pipe: Any, forecaster: Any = None, *, separate_cfg: bool | None = None, **options: Any
) -> dict[str, Any]:
    """The arguments of `cache_dit.enable_cache(pipe, ...)`, which `disable_cache(pipe)` undoes.

    Args:
        pipe: a diffusers pipeline that cache-dit has an adapter for.
        forecaster: as for `lesa.enable`, made for the hidden tap or for any.
        separate_cfg: whether guidance is a second call; what cache-dit knows of it if None.
        options: `full_steps`, `schedule` or a target, as for `lesa.enable`; read in every run anew.

    Raises:
        LesaError: no cache-dit 1.5, no adapter for the pipeline, or no forecaster that fits.
    """
    package: Any = engine("cache_dit", "1.5", "cache-dit>=1.5.3,<1.6", "caching")
    adapters = package.BlockAdapterRegister
    if not hasattr(pipe, "scheduler") or not adapters.is_supported(pipe):
        raise LesaError(
            f"pipe: cache-dit has no adapter for a {type(pipe).__name__}; use lesa.enable(pipe)"
        )
    plan = Plan(hidden_config("cache-dit", forecaster, options))
    plan.check_model(type(find_denoiser(pipe)).__name__)
    separate = adapters.has_separate_cfg(pipe) if separate_cfg is None else separate_cfg
    source = _Source(pipe, plan, bool(separate))
    _install()
    config = package.DBCacheConfig(
        Fn_compute_blocks=1, max_warmup_steps=0, enable_separate_cfg=source.separate_cfg
    )
    config.steps_computation_mask, config.steps_computation_policy = _Mask(source), "static"
    known = package.caching.CalibratorConfig(
        True, False, "lesa", "hidden_states", calibrator_kwargs={"source": source}
    )
    return {"cache_config": config, "calibrator_config": known}


class _Shared:
    """Shared by all contexts of a pipeline: cache-dit copies its configurations deeply."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class _Source(_Shared):
    """The run that a pipeline is in, and its `mask`: 1 for each step that is full."""

    def __init__(self, pipe: Any, plan: Plan, separate_cfg: bool) -> None:
        self.plan, self.separate_cfg = plan, separate_cfg
        self.run, self.mask = Generation(), [1]
        self._pipe, self._made = weakref.ref(pipe), 0

    def follow(self, step: int) -> None:
        """Read the run at step 0, before the mask is asked; LesaError where calls are no steps."""
        pipe: Any = self._pipe()
        if not step and self.run.timesteps is not pipe.scheduler.timesteps:
            self.run = run_of(pipe.scheduler, pipe)
            full = self.plan.schedule(self.run)
            self.mask = [int(full.is_full(at)) for at in range(full.steps)]
        place = getattr(pipe.scheduler, "step_index", None)
        if place is not None and place - self.run.first != step:
            raise LesaError(
                f"separate_cfg={self.separate_cfg}: after {step} calls the loop is at step "
                f"{place - self.run.first}; pass separate_cfg={not self.separate_cfg}"
            )

    def calibrator(self) -> Calibrator:
        """A context makes one for the prompt and, where guidance is a call of its own, a second."""
        self._made += 1
        return Calibrator(self, "uncond" if self.separate_cfg and not self._made % 2 else "cond")


class _Mask(_Shared, Sequence[int]):
    """The source's mask as it is when cache-dit asks, which computes those steps."""

    def __init__(self, source: _Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source.mask)

    def __getitem__(self, step: Any) -> Any:
        return self._source.mask[step]


class Calibrator:
    """What cache-dit asks of a calibrator, answered from lesa's table; a stream for each name."""

    def __init__(self, source: _Source, branch: str) -> None:
        self._source, self._branch, self._step = source, branch, -1
        self.states: dict[str, Stream] = {}

    def reset_cache(self) -> None:
        """A generation begins."""
        self._step, self.states = -1, {}

    def mark_step_begin(self) -> None:
        """The next step begins; LesaError at the first one if the run does not fit."""
        self._step += 1
        self._source.follow(self._step)

    def update(self, Y: Tensor, name: str = "default") -> None:
        """Take what the last block returned at a full step."""
        if name not in self.states:
            self.states[name] = self._source.plan.stream(self._source.run, self._branch)
        self.states[name].keep(self._step, Y)

    def approximate(self, name: str = "default") -> Tensor:
        """What it would return at a skipped one."""
        return self.states[name].forecast(self._step)


def _install() -> None:
    """cache-dit's list of calibrators is closed: let its factory know lesa's too."""
    from cache_dit.caching.cache_contexts import cache_context

    known = cache_context.Calibrator
    if hasattr(known, "knows_lesa"):
        return

    def made(calibrator_config: Any) -> Any:
        if calibrator_config.calibrator_type != "lesa":
            return known(calibrator_config)
        return calibrator_config.calibrator_kwargs["source"].calibrator()

    made.knows_lesa = True  # type: ignore[attr-defined]
    cache_context.Calibrator = made
