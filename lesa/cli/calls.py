"""Arguments of `pipe(...)`: read from options, checked by its class, and by the pipeline itself."""

from __future__ import annotations

import ast
import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lesa.cli.names import did_you_mean
from lesa.cli.saved import Saved
from lesa.cli.schedulers import check_steps
from lesa.errors import LesaError
from lesa.testbed import PIPELINES

__all__ = ["call_settings", "full_steps_of", "further_arguments", "rehearse"]

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
_NAMES = {"num_frames": "frames", "num_inference_steps": "num-inference-steps"}
# Pixels that a token of an embedded pipeline covers, or that its frames are rounded to.
_MULTIPLES = {name: 8 for name in PIPELINES} | {"hunyuan": 16}
_SIZES = re.compile(r"divisible by\D*(\d+)", re.I)


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
            _check_multiple(name, settings[name], _MULTIPLES[saved.embedded], saved.embedded)
    return settings


def full_steps_of(forecaster: Any, num_steps: int) -> int | None:
    """Of the counts that a forecaster was calibrated for, the one nearest to a fifth of the steps.

    Counts of this number of steps come before those of others; None without any that fits.
    """
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


def rehearse(
    pipe: Any, prompts: Sequence[str], settings: Mapping[str, Any], scheduler: str | None = None
) -> None:
    """Call the pipeline up to its first step: it looks at its arguments before any work is done.

    scheduler: the name of the sampler that it was given, if any.

    Raises: LesaError for what the pipeline refuses, or would round in silence.
    """
    import torch

    from lesa.hooks.prompt_inputs import pictures_per_prompt, prompt_arguments
    from lesa.hooks.timed_run import generators, loop_bar

    def begun() -> None:
        raise _Begun

    own, kind = prompt_arguments(prompts, settings, [0]), type(pipe)
    if "prompt" in own and "prompt" not in inspect.signature(kind.__call__).parameters:
        raise LesaError(
            f"prompts={prompts[0]!r}: {kind.__name__} takes no prompt; give a pipeline that draws"
            " from text, or use lesa.enable with a call of your own"
        )
    arguments = {**own, "output_type": "latent", "return_dict": False}
    arguments["generator"] = generators(range(pictures_per_prompt(settings)))
    try:
        with _advice() as said, torch.no_grad(), loop_bar(pipe, begun):
            pipe(**arguments)
    except _Begun:
        for text in said:
            if divisor := _SIZES.search(text):
                raise _wrong_size(pipe, settings, int(divisor[1]), text) from None
    except (ValueError, TypeError, AssertionError) as error:
        if isinstance(error, LesaError):
            raise
        raise _refusal(pipe, settings, error, scheduler) from error


class _Begun(Exception):
    """Ends a rehearsal where the first step would begin."""


def _refusal(
    pipe: Any, settings: Mapping[str, Any], error: Exception, scheduler: str | None
) -> LesaError:
    text = " ".join(str(error).split()) or type(error).__name__
    if divisor := _SIZES.search(text):
        return _wrong_size(pipe, settings, int(divisor[1]), text)
    shown = re.sub(r"<class '[\w.]*?(\w+)'>('s)?", r"\1\2", text)[:200].rstrip(" .:")
    kind = type(pipe).__name__
    if scheduler is not None and (isinstance(error, AssertionError) or "scheduler" in text):
        return LesaError(
            f"scheduler={scheduler!r}: {kind} cannot run with it ({shown});"
            " choose another or leave it out"
        )
    named = [name for name in settings if re.search(rf"\b{name}\b", text)] or list(settings)
    listed = ", ".join(f"{_NAMES.get(name, name)}={settings[name]!r}" for name in named)
    return LesaError(f"{listed}: {kind} refuses it ({shown}); give what it takes")


def _wrong_size(pipe: Any, settings: Mapping[str, Any], divisor: int, text: str) -> LesaError:
    """Which of the sizes is no multiple of the divisor that a pipeline tells."""
    kind = type(pipe).__name__
    try:
        if "frames" in text:  # a first frame, and then groups of them
            _check_multiple("num_frames", settings.get("num_frames"), divisor, kind, 1)
        else:
            for name in ("height", "width"):
                _check_multiple(name, settings.get(name), divisor, kind)
    except LesaError as error:
        return error
    return LesaError(f"height, width: {kind} refuses them ({text}); give others")


def _check_multiple(name: str, value: Any, divisor: int, kind: str, more: int = 0) -> None:
    """LesaError for a size that is no multiple, plus `more`, with the two next to it."""
    if not isinstance(value, int) or (value - more) % divisor == 0:
        return
    below = (value - more) // divisor * divisor + more
    near = " or ".join(str(size) for size in (below, below + divisor) if size > 0)
    what = f"multiples of {divisor}{f' plus {more}' if more else ''}"
    raise LesaError(f"{_NAMES.get(name, name)}={value}: {kind} takes {what}; give {near}")


@contextmanager
def _advice() -> Iterator[list[str]]:
    """The warnings of diffusers while it lasts, whatever is shown of them."""
    said: list[str] = []
    logger = logging.getLogger("diffusers")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level, handlers, passes = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        logger.handlers, logger.propagate = handlers, passes
        logger.setLevel(level)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return text
