"""A pipeline is called up to its first step, so that it refuses arguments before any work."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lesa.cli.calls import NAMES, check_multiple
from lesa.errors import LesaError, is_out_of_memory

__all__ = ["begin", "check_levels", "rehearse"]

_SIZES = re.compile(r"divisible by\D*(\d+)", re.I)


def rehearse(
    pipe: Any, prompts: Sequence[str], settings: Mapping[str, Any], scheduler: str | None = None
) -> None:
    """Call the pipeline up to its first step: it looks at its arguments before any work is done.

    scheduler: the name of the sampler that it was given, if any.

    Raises: LesaError for what the pipeline refuses, or would round in silence.
    """
    from lesa.hooks.prompt_inputs import pictures_per_prompt, prompt_arguments
    from lesa.hooks.timed_run import generators

    own, kind = prompt_arguments(prompts, settings, [0]), type(pipe)
    if "prompt" in own and "prompt" not in inspect.signature(kind.__call__).parameters:
        raise LesaError(
            f"prompts={prompts[0]!r}: {kind.__name__} takes no prompt; give a pipeline that draws"
            " from text, or use lesa.enable with a call of your own"
        )
    arguments = {**own, "output_type": "latent", "return_dict": False}
    try:
        arguments["generator"] = generators(range(pictures_per_prompt(settings)))
        begin(pipe, arguments, settings)
    except Exception as error:  # what a pipeline does with a wrong argument may be anything
        if isinstance(error, LesaError) or is_out_of_memory(error):
            raise
        raise _refusal(pipe, settings, error, scheduler) from error


def begin(pipe: Any, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Call a pipeline up to its first step, with all its arguments.

    settings: those of them that a user may have given.

    Raises: LesaError for a size that it refuses or would round; else whatever it raises.
    """
    import torch

    from lesa.hooks.timed_run import loop_bar

    def begun() -> None:
        raise _Begun

    try:
        with _advice() as said, torch.no_grad(), loop_bar(pipe, begun), suppress(_Begun):
            pipe(**arguments)
    except Exception as error:
        if (found := _wrong_size(pipe, settings, str(error))) is not None:
            raise found from error
        raise
    for text in said:
        if (found := _wrong_size(pipe, settings, text)) is not None:
            raise found
    if temporal := getattr(pipe, "vae_scale_factor_temporal", None):  # not every one warns
        check_multiple("num_frames", settings.get("num_frames"), temporal, type(pipe).__name__, 1)


def check_levels(pipe: Any, settings: Mapping[str, Any]) -> None:
    """LesaError where the shift of the size that a pipeline was begun with leaves training no
    steps that it could follow."""
    from lesa.hooks.scheduler_advice import other_size

    if (problem := other_size(pipe, "--height {0} --width {0}")) is not None:
        size = ", ".join(f"{name}={settings.get(name)}" for name in ("height", "width"))
        raise LesaError(f"{size}: training cannot follow its steps, {problem}")


class _Begun(Exception):
    """Ends a rehearsal where the first step would begin."""


def _refusal(
    pipe: Any, settings: Mapping[str, Any], error: Exception, scheduler: str | None
) -> LesaError:
    text = " ".join(str(error).split()) or type(error).__name__
    shown = re.sub(r"<class '[\w.]*?(\w+)'>('s)?", r"\1\2", text)[:200].rstrip(" .:")
    kind = type(pipe).__name__
    if scheduler is not None and (isinstance(error, AssertionError) or "scheduler" in text):
        return LesaError(
            f"scheduler={scheduler!r}: {kind} cannot run with it ({shown});"
            " choose another or leave it out"
        )
    named = [name for name in settings if re.search(rf"\b{name}\b", text)] or list(settings)
    listed = ", ".join(f"{NAMES.get(name, name)}={settings[name]!r}" for name in named)
    return LesaError(f"{listed}: {kind} refuses it ({shown}); give what it takes")


def _wrong_size(pipe: Any, settings: Mapping[str, Any], text: str) -> LesaError | None:
    """Which of the sizes is no multiple of the divisor that a pipeline tells, if it tells one."""
    if (told := _SIZES.search(text)) is None:
        return None
    kind, divisor = type(pipe).__name__, int(told[1])
    try:
        if "frames" in text:  # a first frame, and then groups of them
            check_multiple("num_frames", settings.get("num_frames"), divisor, kind, 1)
        else:
            for name in ("height", "width"):
                check_multiple(name, settings.get(name), divisor, kind)
    except LesaError as error:
        return error
    return LesaError(f"height, width: {kind} refuses them ({text}); give others")


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
