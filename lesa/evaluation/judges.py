"""What judges a picture beside its distance to the plain run: CLIP, ImageReward, LPIPS, and the
checker of the embedded pipelines.

A judge takes the plain pictures, a method's and their prompts, and gives one number per picture for
every name. All but LPIPS look at the method's pictures alone; the plain run is judged as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.testbed import part
from lesa.util.perceptual import lpips

LPIPS = "lpips"  # the name of what `perceptual_distance` gives


class Judge(Protocol):
    """Pictures [N, 3, H, W] or videos [N, F, 3, H, W] in [0, 1], and N prompts -> name -> [N]."""

    def __call__(
        self, plain: Tensor, images: Tensor, prompts: Sequence[str]
    ) -> dict[str, Tensor]: ...


class ClipScore:
    """`clip`: 100 max(cos(image, text), 0) of a CLIP model (arXiv 2104.08718, scaled as in
    torchmetrics); the mean over a video's frames.

    No published CLIP weights were at hand when this was written: it is tested on a small random
    model, against its two towers in float64.

    Args:
        source: folder or hub id of a CLIP model with its processor, e.g.
            "openai/clip-vit-base-patch32".

    Raises: LesaError if it cannot be loaded.
    """

    def __init__(self, source: str | Path, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self._processor = CLIPProcessor.from_pretrained(source)
            self._model: Any = CLIPModel.from_pretrained(source).to(device).eval()
        except (OSError, ValueError, ImportError) as error:
            raise LesaError(
                f"clip={str(source)!r}: not a CLIP model with its processor"
                f" ({_first_line(error)}); give a folder or a hub id"
            ) from None

    def __call__(self, plain: Tensor, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        pictures, each = _frames(images)
        texts = [prompt for prompt in prompts for _ in range(each)]
        inputs = self._processor(
            text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True
        )
        with torch.inference_mode():
            found = self._model(**inputs.to(self._model.device))  # embeddings of length 1
        cosines = (found.image_embeds * found.text_embeds).sum(-1)
        return {"clip": _per_prompt(100 * cosines.clamp(min=0), each)}


class ImageReward:
    """`image_reward`: the human preference model of arXiv 2304.05977, through its own package; the
    mean over a video's frames.

    Neither package nor weights were at hand when this was written: only the calls that it makes are
    tested.

    Args:
        source: name of a published model, or the path of a checkpoint.

    Raises: LesaError if the package is not importable or the weights cannot be loaded.
    """

    def __init__(
        self, source: str | Path = "ImageReward-v1.0", device: torch.device | str = "cpu"
    ) -> None:
        try:
            self._model = import_module("ImageReward").load(str(source), device=device)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise LesaError(
                f"image-reward={str(source)!r}: not usable ({_first_line(error)});"
                " run pip install image-reward, and give a checkpoint where there is no network"
            ) from None

    def __call__(self, plain: Tensor, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        from PIL import Image

        pictures, each = _frames(images)
        with torch.inference_mode():
            scores = [
                float(self._model.score(prompts[row // each], Image.fromarray(picture)))
                for row, picture in enumerate(pictures)
            ]
        return {"image_reward": _per_prompt(torch.tensor(scores), each)}


def perceptual_distance(plain: Tensor, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`lpips`: the learned perceptual distance to the plain picture."""
    return {LPIPS: lpips(plain, images)}


def attributes(plain: Tensor, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """`shape`, `colour`, `place`, and `motion` of videos: shares of what a caption of the embedded
    pipelines says that its picture shows (`lesa_testbed.checker`).

    Raises: LesaError for a prompt that is not such a caption, or without lesa-testbed.
    """
    checker = part("lesa_testbed.checker", "judge='attributes'")

    if foreign := [text for text in prompts if not checker.is_caption(text)]:
        raise LesaError(
            "judge='attributes': it knows the embedded pipelines' captions alone, not"
            f" {foreign[0]!r}; leave it out"
        )
    pictures = images.movedim(-3, -1).cpu().numpy()
    found = [
        checker.accuracy(picture[None], [text])
        for picture, text in zip(pictures, prompts, strict=True)
    ]
    return {name: torch.tensor([verdict[name] for verdict in found]) for name in found[0]}


def named(name: str, device: torch.device | str = "cpu") -> Judge:
    """A judge by its name: "attributes", "image-reward", or "clip=" and a folder or hub id.

    Raises: LesaError for another name, or where it cannot be loaded.
    """
    kind, _, source = name.partition("=")
    if kind == "clip" and source:
        return ClipScore(source, device)
    if name == "image-reward":
        return ImageReward(device=device)
    if name == "attributes":
        return attributes
    raise LesaError(f"judge={name!r}: unknown; choose attributes, image-reward or clip=FOLDER")


def _frames(images: Tensor) -> tuple[list[Any], int]:
    """All frames as 8-bit arrays [H, W, 3], and how many each picture or video has."""
    each = images.shape[1] if images.ndim == 5 else 1
    frames = (images.flatten(0, -4).clamp(0, 1) * 255).round().byte().movedim(1, -1)
    return list(frames.cpu().numpy()), each


def _per_prompt(scores: Tensor, each: int) -> Tensor:
    return scores.cpu().double().reshape(-1, each).mean(1)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
