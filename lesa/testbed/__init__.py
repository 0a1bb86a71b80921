"""Small, truly trained pipelines of the diffusers classes, shipped with the package; see
scenes.py and recipes/."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    """How one embedded pipeline is called; `base` names the one whose other components it has."""

    call: dict[str, Any]
    base: str | None = None
    parts: tuple[str, ...] = field(default=())


_ROWS = {
    "flux": _Embedded(
        dict(num_inference_steps=50, guidance_scale=3.5, max_sequence_length=20, **_SQUARE)
    ),
    "schnell": _Embedded(
        dict(num_inference_steps=4, guidance_scale=0.0, max_sequence_length=20, **_SQUARE),
        base="flux",
        parts=("transformer", "scheduler"),
    ),
}
PIPELINES = tuple(_ROWS)


def load(name: str = "flux") -> Any:
    """The embedded pipeline ``name`` (or any pipeline folder) in float32, progress bar off."""
    from diffusers import DiffusionPipeline

    folder = _HERE / name if name in PIPELINES else Path(name)
    row = _ROWS.get(name, _Embedded({}))
    home = _HERE / row.base if row.base else folder
    if not (home / "model_index.json").exists():
        raise LesaError(
            f"pipeline {name!r} is neither embedded ({', '.join(PIPELINES)}) nor a pipeline "
            "folder: pass one of these"
        )
    pipe = DiffusionPipeline.from_pretrained(home, **{p: _part(folder, home, p) for p in row.parts})
    pipe.default_sample_size = _SAMPLE_SIZE  # what pipe(...) makes when no height is given
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _part(folder: Path, home: Path, name: str) -> Any:
    """A component of ``folder``, of the class that the pipeline in ``home`` has for it."""
    import json

    import diffusers

    _, cls = json.loads((home / "model_index.json").read_text())[name]
    return getattr(diffusers, cls).from_pretrained(folder / name)


def settings(name: str = "flux") -> dict[str, Any]:
    """Call arguments that the pipeline was trained for: ``pipe(prompt, **settings(name))``."""
    if name not in PIPELINES:
        raise LesaError(f"pipeline {name!r} is not embedded: choose one of {', '.join(PIPELINES)}")
    return dict(_ROWS[name].call)
