"""lesa inside vLLM-Omni as `cache_backend="lesa"`.

`register` is the entry point of the group `vllm_omni.general_plugins`, which every process of the
engine calls. The cache's configuration names the forecaster and the budget:

    Omni(model=..., cache_backend="lesa", cache_config={"forecaster": "my-lesa", "full_steps": 10})
"""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

from torch import nn

import lesa
from lesa.engine.config import LesaConfig
from lesa.errors import LesaError
from lesa.hooks.attach import attached
from lesa.integrations.engines import engine

__all__ = ["Backend", "part", "register", "transformers"]

logger = logging.getLogger("lesa")
_PACKAGE = "vllm_omni.diffusion"
_OPTIONS = ("forecaster", "full_steps", "target_speedup", "target_psnr", "quality")


def register() -> None:
    """Let the engine's selector of cache backends, whose list is closed, know lesa; once. An engine
    of another layout goes on without it, with a warning."""
    try:
        known = part("cache.selector").get_cache_backend
    except (LesaError, AttributeError) as error:
        logger.warning("cache_backend='lesa' is not there: %s", error)
        return
    if hasattr(known, "knows_lesa"):
        return

    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        if cache_backend != "lesa":
            return known(cache_backend, cache_config)
        if isinstance(cache_config, dict):
            cache_config = part("data").DiffusionCacheConfig.from_dict(cache_config)
        base = part("cache.base").CacheBackend
        return type("LesaCacheBackend", (Backend, base), {})(cache_config)

    get_cache_backend.knows_lesa = True  # type: ignore[attr-defined]
    for name in ("cache.selector", "worker.diffusion_model_runner"):  # which imports it by name
        module = sys.modules.get(f"{_PACKAGE}.{name}")
        if getattr(module, "get_cache_backend", None) is known:
            module.get_cache_backend = get_cache_backend  # type: ignore[union-attr]


class Backend:
    """A `CacheBackend`: what its `enable` puts on the transformers is a lesa cache at the output
    tap, which follows the pipeline's scheduler and needs nothing of the model but its arguments."""

    config: Any
    enabled: bool

    def enable(self, pipeline: Any) -> None:
        """Accelerate the transformers of a pipeline.

        Raises:
            LesaError: an option is invalid, the forecaster was made for another model, or the
                pipeline has no scheduler that tells its steps.
        """
        models, scheduler = transformers(pipeline), getattr(pipeline, "scheduler", None)
        if not models or not hasattr(scheduler, "timesteps"):
            raise LesaError(
                f"pipeline: a {type(pipeline).__name__} has no transformer, or no scheduler with "
                "timesteps; choose another cache_backend"
            )
        given = {name: getattr(self.config, name, None) for name in _OPTIONS}
        options = {name: value for name, value in given.items() if value is not None}
        options["forecaster"] = _by_order(LesaConfig(**options, tap="output").forecaster)
        config = LesaConfig(**options, tap="output", scheduler=scheduler)
        for model in models:
            lesa.apply_lesa_cache(model, config)
        self._lesa_config = config
        self.enabled = True

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """A new generation begins: nothing of the one before is left.

        Raises:
            LesaError: the budget does not fit so many steps.
        """
        if num_inference_steps and self._lesa_config.full_steps is not None:
            self._lesa_config.bound_schedule(num_inference_steps)
        for model in transformers(pipeline):
            denoiser = attached(model)
            if denoiser is not None:
                denoiser.reset()


def transformers(pipeline: Any) -> list[nn.Module]:
    """The denoisers of a pipeline of the engine."""
    names = getattr(pipeline, "_dit_modules", None) or ("transformer", "transformer_2")
    found = [getattr(pipeline, name, None) for name in names]
    return [model for model in found if isinstance(model, nn.Module)]


def part(name: str) -> Any:
    """A module of the engine's diffusion runtime; LesaError where it is not there."""
    return engine(f"{_PACKAGE}.{name}", "", "vllm-omni")


def _by_order(forecaster: Any) -> Any:
    """Rows of "uncond" for the second call of a step, and for the first one on a rank that makes
    nothing but the negative prediction: the engine's loops name no call."""
    if "uncond" not in getattr(forecaster, "branches", ()):
        return forecaster
    first = "uncond" if _cfg_rank() else "cond"
    names = {"default": first, "default#1": "uncond"}
    found = copy.copy(forecaster)
    found.branch = lambda asked: forecaster.branch(names.get(asked, asked))
    return found


def _cfg_rank() -> int:
    """Which prediction this process makes under CFG-parallel; 0 without it."""
    state: Any = sys.modules.get(f"{_PACKAGE}.distributed.parallel_state")
    if state is None or not getattr(state, "is_cfg_group_initialized", lambda: False)():
        return 0
    return int(state.get_classifier_free_guidance_rank())
