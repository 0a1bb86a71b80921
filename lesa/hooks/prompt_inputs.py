"""The arguments of a pipeline call that belong to single prompts: texts, embeddings, images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lesa.errors import LesaError

__all__ = ["count_prompts", "pictures_per_prompt", "prompt_arguments", "settings_of"]

_EMBEDDED = "prompt_embeds"


def prompt_arguments(
    prompts: Sequence[str], settings: Mapping[str, Any], rows: Sequence[int]
) -> dict[str, Any]:
    """Arguments of `pipe(...)` for some of the prompts, in this order and with repeats.

    Where `settings` holds `prompt_embeds`, the prompts are mere titles and are not passed. A single
    negative prompt is given once per prompt, since some pipelines would make one row of it only.
    """
    taken = settings_of(settings, rows, len(prompts))
    if settings.get(_EMBEDDED) is None:
        taken["prompt"] = [prompts[row] for row in rows]
        for name, value in settings.items():
            if name.startswith("negative_prompt") and isinstance(value, str):
                taken[name] = [value] * len(rows)
    return taken


def pictures_per_prompt(settings: Mapping[str, Any]) -> int:
    """How many pictures or videos a call makes of each prompt."""
    return settings.get("num_images_per_prompt") or settings.get("num_videos_per_prompt") or 1


def count_prompts(settings: Mapping[str, Any]) -> int:
    """Number of prompts that `settings` holds as embeddings.

    Raises:
        LesaError: it holds none.
    """
    embedded = settings.get(_EMBEDDED)
    if embedded is None:
        raise LesaError(
            "prompts=None: no prompts are there as embeddings either; give prompt_embeds=... (one "
            "row each), or a list of prompts"
        )
    return len(embedded)


def settings_of(settings: Mapping[str, Any], rows: Sequence[int], count: int) -> dict[str, Any]:
    """The settings of some of `count` prompts: of every argument about prompts or images that is a
    tensor or a list with one entry per prompt, these entries; the others as they are."""
    return {name: _entries(name, value, rows, count) for name, value in settings.items()}


def _entries(name: str, value: Any, rows: Sequence[int], count: int) -> Any:
    per_prompt = ("prompt" in name or "image" in name) and isinstance(value, (Tensor, list))
    if not per_prompt or len(value) != count:
        return value
    return value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]
