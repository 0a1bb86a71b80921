"""Small, truly trained pipelines of the diffusers classes, shipped with the package; see
scenes.py and recipes/."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lesa.errors import LesaError
from lesa.testbed.scenes import captions

__all__ = ["PIPELINES", "captions", "load", "settings"]

_SAMPLE_SIZE = 16  # latent pixels: 64 x 64 pictures
_HERE = Path(__file__).parent
_SQUARE = dict(height=64, width=64)


@dataclass(frozen=True)
class _Embedded:
    """How one embedded pipeline is called; a student has the components of its `teacher`, but
    another scheduler and a changed denoiser."""

    call: dict[str, Any]
    teacher: str | None = None
    guidance: float | None = None  # folded into the student of a teacher that takes it as input


_ROWS = {
    "flux": _Embedded(
        dict(num_inference_steps=50, guidance_scale=3.5, max_sequence_length=20, **_SQUARE)
    ),
    "schnell": _Embedded(
        dict(num_inference_steps=4, guidance_scale=0.0, max_sequence_length=20, **_SQUARE),
        teacher="flux",
        guidance=3.5,
    ),
}
PIPELINES = tuple(_ROWS)


def load(name: str = "flux") -> Any:
    """The embedded pipeline ``name`` (or any pipeline folder) in float32, progress bar off."""
    from diffusers import DiffusionPipeline

    row = _ROWS.get(name)
    if row is not None and row.teacher is not None:
        return _student(name, row.teacher, row.guidance)
    folder = _HERE / name if name in PIPELINES else Path(name)
    if not (folder / "model_index.json").exists():
        raise LesaError(
            f"pipeline {name!r} is neither embedded ({', '.join(PIPELINES)}) nor a pipeline "
            "folder: pass one of these"
        )
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.default_sample_size = _SAMPLE_SIZE  # what pipe(...) makes when no height is given
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _student(name: str, teacher: str, guidance: float | None) -> Any:
    from lesa.testbed.students import add_difference, without_guidance

    pipe = load(teacher)
    if guidance is not None:
        pipe.transformer = without_guidance(pipe.transformer, guidance)
    add_difference(pipe.transformer, _HERE / name / "transformer")
    pipe.scheduler = type(pipe.scheduler).from_pretrained(_HERE / name / "scheduler")
    return pipe


def settings(name: str = "flux") -> dict[str, Any]:
    """Call arguments that the pipeline was trained for: ``pipe(prompt, **settings(name))``."""
    if name not in PIPELINES:
        raise LesaError(f"pipeline {name!r} is not embedded: choose one of {', '.join(PIPELINES)}")
    return dict(_ROWS[name].call)
