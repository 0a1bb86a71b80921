"""Loads the embedded pipelines: small, truly trained ones of the diffusers classes.

They are a distribution of their own, lesa-testbed (package `lesa_testbed`, folder `testbed/` of a
checkout). Their names and settings are known without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lesa.errors import LesaError

__all__ = ["PIPELINES", "captions", "folders", "load", "part", "prompts", "settings"]

_SAMPLE_SIZE = 16  # latent pixels: 64 x 64 pictures
_SQUARE = dict(height=64, width=64)


@dataclass(frozen=True)
class _Embedded:
    """How one embedded pipeline is called, and what it has of another one.

    `vae` names the pipeline whose autoencoder it uses. A student has all components of its
    `teacher`, but another scheduler and a changed denoiser; `guidance` is the scale that is folded
    into it, where the teacher takes one as input.
    """

    call: dict[str, Any]
    moving: bool = False
    vae: str | None = None
    teacher: str | None = None
    guidance: float | None = None


_ROWS = {
    "flux": _Embedded(
        dict(num_inference_steps=50, guidance_scale=3.5, max_sequence_length=20, **_SQUARE)
    ),
    "schnell": _Embedded(
        dict(num_inference_steps=4, guidance_scale=0.0, max_sequence_length=20, **_SQUARE),
        teacher="flux",
        guidance=3.5,
    ),
    "qwen": _Embedded(
        dict(num_inference_steps=50, true_cfg_scale=4.0, negative_prompt=" ", **_SQUARE)
    ),
    "lightning": _Embedded(
        dict(num_inference_steps=8, true_cfg_scale=1.0, **_SQUARE), teacher="qwen"
    ),
    "sdxl": _Embedded(dict(num_inference_steps=50, guidance_scale=5.0, **_SQUARE), vae="flux"),
    "hunyuan": _Embedded(
        dict(
            num_inference_steps=50,
            guidance_scale=6.0,
            num_frames=9,
            max_sequence_length=24,
            prompt_template={"template": "{}", "crop_start": 0},
            **_SQUARE,
        ),
        moving=True,
    ),
}
PIPELINES = tuple(_ROWS)


def part(name: str, asked: str) -> Any:
    """A module of lesa-testbed by its dotted name; `asked` is the field and value that need it.

    Raises: LesaError where lesa-testbed is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lesa_testbed":
            raise
        raise LesaError(
            f"{asked}: the embedded pipelines are not installed; "
            "run `pip install ./testbed` in a checkout of lesa"
        ) from None


def _folder(name: str) -> Path:
    found: Path = part("lesa_testbed", f"pipeline={name!r}").FOLDER / name
    return found


def folders(name: str) -> tuple[Path, ...]:
    """Where an embedded pipeline lies, and the rest of it: a student's teacher."""
    teacher = _ROWS[name].teacher
    return (_folder(name), *([_folder(teacher)] if teacher else []))


def load(name: str = "flux") -> Any:
    """The embedded pipeline ``name`` (or any pipeline folder) in float32, progress bar off.

    Raises: LesaError for another name, or where lesa-testbed is not installed.
    """
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline

    row = _ROWS.get(name)
    if row is not None and row.teacher is not None:
        return _student(name, row.teacher, row.guidance)
    folder = _folder(name) if name in PIPELINES else Path(name)
    if not (folder / "model_index.json").exists():
        raise LesaError(
            f"pipeline {name!r} is neither embedded ({', '.join(PIPELINES)}) nor a pipeline "
            "folder: pass one of these"
        )
    shared = {}
    if row is not None and row.vae is not None:
        shared["vae"] = AutoencoderKL.from_pretrained(_folder(row.vae) / "vae")
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **shared)
    pipe.default_sample_size = _SAMPLE_SIZE  # what pipe(...) makes when no height is given
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _student(name: str, teacher: str, guidance: float | None) -> Any:
    students = part("lesa_testbed.students", f"pipeline={name!r}")
    pipe, folder = load(teacher), _folder(name)
    if guidance is not None:
        pipe.transformer = students.without_guidance(pipe.transformer, guidance)
    students.add_difference(pipe.transformer, folder / "transformer")
    pipe.scheduler = type(pipe.scheduler).from_pretrained(folder / "scheduler")
    return pipe


def settings(name: str = "flux") -> dict[str, Any]:
    """Call arguments that the pipeline was trained for: ``pipe(prompt, **settings(name))``."""
    if name not in _ROWS:
        raise LesaError(f"pipeline {name!r} is not embedded: choose one of {', '.join(PIPELINES)}")
    return dict(_ROWS[name].call)


def captions(count: int, seed: int = 0, split: str = "test", *, moving: bool = False) -> list[str]:
    """Distinct captions of scenes (see `lesa_testbed.scenes.captions`)."""
    made: list[str] = part("lesa_testbed.scenes", f"captions={count}").captions(
        count, seed, split, moving=moving
    )
    return made


def prompts(name: str, count: int, seed: int = 0, split: str = "test") -> list[str]:
    """Distinct captions of the kind that the pipeline ``name`` was trained on."""
    return captions(count, seed, split, moving=_ROWS[name].moving if name in _ROWS else False)
