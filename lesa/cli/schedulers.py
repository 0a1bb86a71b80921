"""`--scheduler NAME`: another sampler of diffusers, made from the config of the pipeline's own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lesa.cli.names import choose
from lesa.errors import LesaError

__all__ = [
    "CLASSES",
    "check_scheduler",
    "check_steps",
    "is_flow",
    "set_scheduler",
    "set_trained_scheduler",
]

CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
_FLOW: tuple[str, ...] = ("flow-euler", "dpm++", "unipc")  # those that can follow a flow
_DIFFUSION: tuple[str, ...] = ("ddim", "euler", "dpm++", "unipc")
_OTHER_SIGMAS = ("EDMEulerScheduler",)  # in diffusers' list, but of another parametrisation


def set_scheduler(pipe: Any, name: str) -> None:
    """Give a pipeline the sampler `name`, with the noise levels that its own config describes.

    Raises: LesaError as `check_scheduler`.
    """
    import diffusers

    own = pipe.scheduler
    config = {**own.config, "_class_name": type(own).__name__}
    check_scheduler(name, config)
    pipe.scheduler = getattr(diffusers, CLASSES[name]).from_config(own.config, **_more(config))


def set_trained_scheduler(pipe: Any, forecaster: Any) -> None:
    """Give a pipeline the sampler that a forecaster was trained with, where it is another one of
    `CLASSES` and the pipeline can have it; else it keeps its own."""
    trained = getattr(forecaster, "metadata", {}).get("scheduler")
    own = type(pipe.scheduler).__name__
    for name, kind in CLASSES.items():
        if kind == trained != own:
            with suppress(LesaError):
                set_scheduler(pipe, name)


def check_scheduler(name: str, config: Mapping[str, Any] | None = None) -> None:
    """Whether `set_scheduler` knows the name and, as far as `config` is known, can do it.

    config: the config of the pipeline's own scheduler, `_class_name` in it.

    Raises: LesaError for an unknown name, or a sampler that the model was not trained for.
    """
    choose(name, CLASSES, "scheduler")
    if config is None:
        return
    kind = str(config.get("_class_name"))
    if is_flow(config):
        supported, what = _FLOW, "flow matching"
    elif kind in _karras() and kind not in _OTHER_SIGMAS:
        supported, what = _DIFFUSION, "noise prediction"
    else:
        raise LesaError(
            f"scheduler={name!r}: a {kind} cannot be replaced by another sampler;"
            " leave --scheduler out"
        )
    if name not in supported:
        raise LesaError(
            f"scheduler={name!r}: the pipeline's {kind} is one of {what}, which {name} does not"
            f" follow; choose from {', '.join(supported)}"
        )


def check_steps(steps: int, config: Mapping[str, Any] | None) -> None:
    """LesaError where a run has more steps than the scheduler was trained with."""
    trained = (config or {}).get("num_train_timesteps")
    if isinstance(trained, int) and steps > trained:
        raise LesaError(
            f"num-inference-steps={steps}: the pipeline's scheduler has {trained} at most;"
            f" give 1 to {trained}"
        )


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is one of flow matching."""
    return (
        "FlowMatch" in str(config.get("_class_name"))
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def _more(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the other sampler needs beyond its config: how a flow is told, and no clipping where
    the config says nothing of it (DDIM would clip latents by default)."""
    if not is_flow(config):
        return {} if "clip_sample" in config else {"clip_sample": False}
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "shift": shift,
    }


def _karras() -> set[str]:
    from diffusers.schedulers import KarrasDiffusionSchedulers

    return {kind.name for kind in KarrasDiffusionSchedulers}
