"""Arguments of `pipe(...)`: read from options, and checked by the class of the pipeline."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lesa.cli.names import did_you_mean
from lesa.cli.saved import Saved
from lesa.cli.schedulers import check_steps
from lesa.errors import LesaError
from lesa.testbed import PIPELINES

__all__ = [
    "call_settings",
    "check_multiple",
    "check_one_each",
    "full_steps_of",
    "further_arguments",
]

_OPTIONS = {  # arguments that lesa gives itself, and the option for each
    "prompt": "--prompt or --prompts",
    "negative_prompt": "--negative-prompt",
    "num_inference_steps": "--num-inference-steps",
    "guidance_scale": "--guidance-scale",
    "height": "--height",
    "width": "--width",
    "num_frames": "--frames",
    "generator": "--seed",
}
_FIXED = ("output_type", "return_dict", "callback_on_step_end", "callback")
NAMES = {"num_frames": "frames", "num_inference_steps": "num-inference-steps"}
# Pixels that a token of an embedded pipeline covers, or that its frames are rounded to.
_MULTIPLES = {name: 8 for name in PIPELINES} | {"hunyuan": 16}


def further_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """["true_cfg_scale=4", "negative_prompt_2=none"] -> {"true_cfg_scale": 4, ...}.

    A value is a Python literal where it reads as one, else a text.

    Raises: LesaError for what is no pair, a key given twice or one that has an option of its own.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise LesaError(f"set={pair!r}: not a key and a value; write --set true_cfg_scale=4")
        if key in _OPTIONS:
            raise LesaError(f"set={pair!r}: it has an option of its own; give {_OPTIONS[key]}")
        if key in _FIXED:
            raise LesaError(f"set={pair!r}: lesa needs {key} itself; leave it out")
        if key in found:
            raise LesaError(f"set={pair!r}: {key} is there twice; give it once")
        found[key] = _literal(text)
    return found


def call_settings(saved: Saved, given: Mapping[str, Any], forecaster: Any = None) -> dict[str, Any]:
    """Arguments for `pipe(...)`: the given ones that are not None, over those that the forecaster
    was trained with, over the embedded pipeline's.

    Raises: LesaError for a given one, or a number of steps, that the pipeline does not take.
    """
    told = {key: value for key, value in given.items() if value is not None}
    check_arguments(saved.kind, told)
    base: dict[str, Any] = {"num_inference_steps": 50}
    if saved.embedded is not None:
        from lesa import testbed

        base |= testbed.settings(saved.embedded)
    known = None if saved.kind is None else arguments_of(saved.kind)
    trained = _trained_call(forecaster)
    base |= {key: value for key, value in trained.items() if known is None or key in known}
    settings = base | told
    check_steps(settings["num_inference_steps"], saved.scheduler)
    if saved.embedded is not None:
        for name in ("height", "width"):
            check_multiple(name, settings[name], _MULTIPLES[saved.embedded], saved.embedded)
    return settings


def full_steps_of(forecaster: Any, num_steps: int) -> int | None:
    """Of the counts that a forecaster was calibrated for, the one nearest to a fifth of the steps.

    Counts of this number of steps come before those of others; None without any that fits. The
    prior, which was calibrated for none, has its default.
    """
    from lesa.forecasters.prior import Prior, default_count

    if isinstance(forecaster, Prior):
        return default_count(num_steps)
    found = [
        (schedule.steps != num_steps, abs(5 * count - num_steps), count)
        for schedule in getattr(forecaster, "calibrated", ())
        if (count := len(schedule.full_steps)) <= num_steps
    ]
    return min(found)[-1] if found else None


def _trained_call(forecaster: Any) -> dict[str, Any]:
    """How the pipeline was called in training: its arguments and its steps."""
    metadata = getattr(forecaster, "metadata", {})
    call = metadata.get("call", {})
    steps = [schedule.steps for schedule in getattr(forecaster, "calibrated", ())][:1]
    return {
        **(call if isinstance(call, dict) else {}),
        **({"num_inference_steps": steps[0]} if steps else {}),
    }


def check_arguments(kind: type | None, given: Mapping[str, Any]) -> None:
    """LesaError for an argument that pipelines of this class do not take; None is any class."""
    if kind is None:
        return
    known = arguments_of(kind)
    for name, value in given.items():
        if name in known:
            continue
        if name == "num_frames":
            raise LesaError(f"frames={value}: {kind.__name__} makes no video; leave it out")
        option = "set" if name not in _OPTIONS else name.replace("_", "-")
        shown = f"{name}={value}" if option == "set" else value
        near = did_you_mean(name, known)
        raise LesaError(
            f"{option}={shown!r}: {kind.__name__} takes no {name}{near};"
            f" it takes {', '.join(known)}"
        )


def arguments_of(kind: type) -> tuple[str, ...]:
    """What `--set` and the options may name of a class of pipelines; what it takes as `**kwargs`
    too would have no effect."""
    parameters = inspect.signature(kind.__call__).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    hidden = {"self", *_FIXED, "callback_on_step_end_tensor_inputs"}
    return tuple(name for name in named if name not in hidden)


def check_one_each(settings: Mapping[str, Any], what: str) -> None:
    """LesaError for a call that makes several pictures of a prompt, where `what` takes one."""
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        value = settings.get(name, 1)
        if isinstance(value, int) and value > 1:
            raise LesaError(f"set='{name}={value}': {what} one of each prompt; leave it out")


def check_multiple(name: str, value: Any, divisor: int, kind: str, more: int = 0) -> None:
    """LesaError for a size that is no multiple, plus `more`, with the two next to it."""
    if not isinstance(value, int) or (value - more) % divisor == 0:
        return
    below = (value - more) // divisor * divisor + more
    near = " or ".join(str(size) for size in (below, below + divisor) if size > 0)
    field, plus = NAMES.get(name, name), f" plus {more}" if more else ""
    raise LesaError(f"{field}={value}: {kind} takes multiples of {divisor}{plus}; give {near}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text
