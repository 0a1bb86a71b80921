"""What the page shows of two runs: pictures, an error map, the strip of steps, a few numbers."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from lesa.play.player import Made
from lesa.util.perceptual import psnr

__all__ = ["ErrorMap", "error_map", "frame_of", "moving", "numbers", "still", "strip"]

SMALLEST = 384  # pixels of the shorter side; what is smaller is shown with larger pixels
FAINTEST = 1 / 255  # an error that is drawn as the brightest, so that rounding stays dark
FPS = 16


@dataclass(frozen=True)
class ErrorMap:
    """A picture of the error, and the error that its brightest colour stands for."""

    picture: Image.Image
    brightest: float


def frame_of(picture: Tensor, number: int) -> Tensor:
    """[3, H, W] itself, or of a video [F, 3, H, W] the frame of this number, at most the last."""
    return picture if picture.ndim == 3 else picture[min(number, len(picture) - 1)]


def still(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] as a picture; a small one with whole pixels made larger."""
    pixels = (picture.float().nan_to_num().clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(pixels.movedim(0, -1).contiguous().numpy())
    factor = math.ceil(SMALLEST / min(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def moving(video: Tensor) -> bytes:
    """[F, 3, H, W] in [0, 1] as an animated WebP, over and over."""
    first, *others = [still(frame) for frame in video]
    buffer = io.BytesIO()
    timing = {"duration": 1000 // FPS, "loop": 0}
    first.save(buffer, "webp", save_all=True, append_images=others, quality=90, **timing)
    return buffer.getvalue()


def error_map(plain: Tensor, accelerated: Tensor) -> ErrorMap:
    """The mean over the channels of |a - b|, [3, H, W] each: black, red, yellow, then white."""
    error = (plain.float() - accelerated.float()).abs().mean(0).nan_to_num(1.0)
    brightest = max(error.max().item(), FAINTEST)
    level = 3 * error / brightest
    return ErrorMap(still(torch.stack([level, level - 1, level - 2])), brightest)


def strip(full_steps: Sequence[int], num_steps: int) -> str:
    """HTML: a box for every step, filled where the whole model ran."""
    full = set(full_steps)
    boxes = "".join(
        f'<i class="{"full" if step in full else "skipped"}" title="step {step + 1}:'
        f' {"full" if step in full else "skipped"}"></i>'
        for step in range(num_steps)
    )
    told = f"{len(full)} of {num_steps} steps in full (filled), {num_steps - len(full)} forecast"
    return f'<div class="lesa-strip" role="img" aria-label="{told}">{boxes}</div><p>{told}</p>'


def numbers(plain: Made | None, accelerated: Made) -> str:
    """HTML: seconds, speed-up and PSNR, as far as they are known."""
    cells = {"accelerated": f"{accelerated.seconds:.2f} s"}
    if plain is None:
        cells = {"plain": "running"} | cells
    else:
        distance = psnr(plain.picture[None], accelerated.picture[None]).item()
        cells = {
            "plain": f"{plain.seconds:.2f} s",
            **cells,
            "faster": f"{plain.seconds / accelerated.seconds:.1f}x",
            "PSNR": "identical" if math.isinf(distance) else f"{distance:.1f} dB",
        }
    shown = "".join(f"<div><b>{cells[name]}</b><span>{name}</span></div>" for name in cells)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in accelerated.notes)
    return f'<div class="lesa-numbers">{shown}</div>{notes}'
