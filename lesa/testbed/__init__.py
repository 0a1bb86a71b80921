"""Small, truly trained pipelines of the diffusers classes, shipped with the package; see
scenes.py and train.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lesa.errors import LesaError
from lesa.testbed.scenes import captions

__all__ = ["PIPELINES", "captions", "load", "settings"]

PIPELINES = ("flux",)
_SAMPLE_SIZE = 16  # latent pixels: 64 x 64 pictures
_HERE = Path(__file__).parent


def load(name: str = "flux") -> Any:
    """The embedded pipeline ``name`` (or any pipeline folder) in float32, progress bar off."""
    from diffusers import DiffusionPipeline

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


def settings(name: str = "flux") -> dict[str, Any]:
    """Call arguments that the pipeline was trained for: ``pipe(prompt, **settings(name))``."""
    if name not in PIPELINES:
        raise LesaError(f"pipeline {name!r} is not embedded: choose one of {', '.join(PIPELINES)}")
    return dict(
        num_inference_steps=50, guidance_scale=3.5, height=64, width=64, max_sequence_length=20
    )
