"""lesa inside ComfyUI: a model of its own classes, patched by the wrappers that it offers.

`apply(model, config)` gives a clone of a MODEL. OUTER_SAMPLE begins and ends a run, whose sigmas
are the noise levels; DIFFUSION_MODEL forecasts what the diffusion model returns (lesa's output
tap), for each conditioning by its uuid, whether they come in one batch or one by one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lesa.engine.config import LesaConfig
from lesa.errors import LesaError
from lesa.hooks.generation import Generation
from lesa.integrations.comfyui_samplers import run_of_sampler
from lesa.integrations.stream import Plan, Stream

__all__ = ["CLASSES", "KEY", "Sampling", "apply"]

logger = logging.getLogger("lesa")
KEY = "lesa"
# Diffusion models of ComfyUI that return what diffusers' class does, with the same sign.
CLASSES = {
    "Flux": "FluxTransformer2DModel",
    "HunyuanVideo": "HunyuanVideoTransformer3DModel",
    "LTXVModel": "LTXVideoTransformer3DModel",
    "QwenImageTransformer2DModel": "QwenImageTransformer2DModel",
    "UNetModel": "UNet2DConditionModel",
    "WanModel": "WanTransformer3DModel",
}


def apply(model: Any, config: LesaConfig) -> Any:
    """A clone of a MODEL (`ModelPatcher`) that runs under `config`; the model stays as it is.

    Raises:
        LesaError: the forecaster was trained for another model or tap, or it cannot be told.
    """
    if config.resolved_tap != "output":
        raise LesaError(
            f"tap={config.resolved_tap!r}: ComfyUI's models have the output tap only; train with "
            "tap='output'"
        )
    plan, kind = Plan(config), type(model.get_model_object("diffusion_model")).__name__
    trained = getattr(config.forecaster, "metadata", {}).get("model_class")
    if trained is not None and kind not in CLASSES:
        raise LesaError(
            f"forecaster {config.forecaster.name!r}: trained for {trained}, and ComfyUI's {kind} "
            "is not known to return the same; use one without training, as lesa-untrained"
        )
    plan.check_model(CLASSES.get(kind, kind))
    patched = model.clone()
    for wrapper in (_outer_sample(plan), _diffusion_model):
        name = wrapper.__name__.removeprefix("_")
        patched.remove_wrappers_with_key(name, KEY)
        patched.add_wrapper_with_key(name, KEY, wrapper)
    return patched


def _outer_sample(plan: Plan) -> Callable[..., Any]:
    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        """(noise, latent_image, sampler, sigmas, ...): a run of its own, then nothing is left."""
        guider, (_, _, sampler, sigmas, *_) = executor.class_obj, args
        sampling = guider.model_patcher.get_model_object("model_sampling")
        run = Sampling(plan, run_of_sampler(sampler, sigmas.tolist(), sampling))
        before = guider.model_options
        inner = {**before.get("transformer_options", {}), KEY: run}
        guider.model_options = {**before, "transformer_options": inner}
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options = before
            counted = ", ".join(f"{count} {what}" for what, count in run.calls.items())
            logger.info("lesa in ComfyUI, calls of the model: %s", counted or "none seen")

    return outer_sample


def _diffusion_model(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """(x, timestep, ..., transformer_options): forecast it or run it."""
    given = (value for value in (*kwargs.values(), *args) if isinstance(value, dict))
    options = next((value for value in given if "uuids" in value), {})
    run, x = options.get(KEY), args[0] if args else None
    if run is None or not isinstance(x, Tensor):
        return executor(*args, **kwargs)
    return run(lambda: executor(*args, **kwargs), x, options)


class Sampling:
    """One run: a stream for each conditioning. What it cannot follow is computed in full and
    counted in `calls`."""

    def __init__(self, plan: Plan, run: Generation) -> None:
        self._plan, self._run, self.calls = plan, run, Counter[str]()
        self._problem, run.problem = run.problem, None
        self._full = plan.schedule(run)
        self._streams: dict[Any, Stream] = {}
        self._steps: dict[Any, int] = {}

    def __call__(self, model: Callable[[], Tensor], x: Tensor, options: dict[str, Any]) -> Tensor:
        """A call of the diffusion model, whose batch holds one part for each uuid."""
        step, uuids = self._step(options["sigmas"]), options["uuids"]
        again = step is None or any(self._steps.get(uuid, -1) >= step for uuid in uuids)
        if again or step is None or self._problem or len(x) % len(uuids):
            self._streams.clear()
            return self._count(self._problem or "not at a new step of the run", model())
        self._steps |= dict.fromkeys(uuids, step)
        branches = ["uncond" if kind else "cond" for kind in options["cond_or_uncond"]]
        parts = zip(uuids, branches, x.chunk(len(uuids)), strict=True)
        pairs = [(self._stream(uuid, branch, step, part), part) for uuid, branch, part in parts]
        if all(stream.skips(step, part) for stream, part in pairs):
            made = [stream.forecast(step, part) for stream, part in pairs]
            return self._count("forecast", torch.cat(made))
        output = self._count("full" if self._full.is_full(step) else "without history", model())
        for (stream, _), part in zip(pairs, output.chunk(len(uuids)), strict=True):
            stream.keep(step, part)
        return output

    def _count(self, what: str, output: Tensor) -> Tensor:
        self.calls[what] += 1
        return output

    def _step(self, sigmas: Tensor) -> int | None:
        """The step with this sigma; None between two. Waits for the device, as ComfyUI's caches
        do."""
        sigma = float(sigmas.flatten()[0])
        near = (abs(sigma - known) <= 1e-4 * known for known in self._run.times[:-1])
        return next((step for step, found in enumerate(near) if found), None)

    def _stream(self, uuid: Any, branch: str, step: int, latent: Tensor) -> Stream:
        """The conditioning's; one that comes or is disturbed later begins with a full step."""
        known = self._streams.get(uuid)
        if known is None or (known.scheduled(step) and not known.skips(step, latent)):
            known = self._streams[uuid] = self._plan.stream(self._run, branch, step)
        return known
