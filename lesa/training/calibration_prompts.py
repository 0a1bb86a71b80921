"""The calibration prompts of `lesa.train`, and those of them that nothing is fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lesa.core.checks import shown, whole
from lesa.errors import LesaError
from lesa.hooks.prompt_inputs import count_prompts
from lesa.training.budget import ENOUGH, quarter
from lesa.util.warn import warn


def checked_prompts(prompts: Iterable[str] | None, call: Mapping[str, Any]) -> list[str]:
    """The prompts, or titles for the embeddings in ``call``.

    Raises:
        LesaError: there are none, or one is empty or no string.
    """
    if prompts is None:
        return [f"embedding {row}" for row in range(count_prompts(call))]
    return _texts("prompts", prompts)


def _texts(name: str, given: Any) -> list[str]:
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))
    texts = list(given) if several else []
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        told = shown(texts if several else given)
        other = "give some, or how many to hold out"
        remedy = "pass 8 to 32 prompts" if name == "prompts" else other
        raise LesaError(f"{name}={told}: not a list of non-empty strings; {remedy}")
    return texts


def held_out(
    validation: Iterable[str] | int | None, texts: Sequence[str], call: Mapping[str, Any]
) -> tuple[list[str], frozenset[int]]:
    """All prompts, and the numbers of those that nothing is fitted to: every fourth of at least
    `ENOUGH` where nothing is said.

    Raises:
        LesaError: fewer prompts than are to be held out, or validation prompts beside embeddings.
    """
    count = len(texts)
    if validation is None:
        if count < ENOUGH:
            warn(
                f"{count} prompts are too few to hold some out, so that lists are chosen on those "
                f"that were fitted; give {ENOUGH} prompts, or validation="
            )
        return [*texts], frozenset(range(3, count, 4) if quarter(count) else ())
    if getattr(validation, "ndim", 1) == 0 or not isinstance(validation, Iterable):  # a number
        validation = whole("validation", validation, 0)
        if validation and count - validation < 2:
            raise LesaError(
                f"validation={validation}: of {count} prompts {max(0, count - validation)} would "
                f"be left to fit; hold out at most {max(0, count - 2)}, or give more prompts"
            )
        places = [round((i + 1) * count / validation) - 1 for i in range(validation)]
        return [*texts], frozenset(places)
    if "prompt_embeds" in call:
        raise LesaError(
            f"validation={shown(validation)}: prompts are given as embeddings; say how many of "
            "their rows are to be held out"
        )
    more = _texts("validation", validation)
    both = sum(text in set(texts) for text in more)
    if both:
        raise LesaError(
            f"validation={shown(more)}: {both} of its prompts are fitted too, and tell nothing of "
            "others; give prompts that are not among those to fit, or a number of them to hold out"
        )
    return [*texts, *more], frozenset(range(count, count + len(more)))
