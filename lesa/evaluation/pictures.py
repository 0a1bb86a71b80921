"""Pictures inside a page: the frames that stand for a video, and data URIs."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor

FRAMES = 5  # of a video that a report shows
LONGEST = 512  # pixels of a side in a page; larger pictures are scaled down
EXACT = 256  # pixels up to which a picture is kept without loss


def shown_frames(picture: Tensor) -> dict[int, Tensor]:
    """Frame number -> [C, H, W]: of a video [F, C, H, W] a few from first to last, else itself."""
    if picture.ndim == 3:
        return {0: picture}
    places = torch.linspace(0, len(picture) - 1, min(FRAMES, len(picture))).round().long()
    return {place: picture[place] for place in places.tolist()}


def data_uri(picture: Tensor) -> str:
    """[C, H, W] in [0, 1], of 1, 3 or 4 channels, as the address of an image inside a page."""
    from PIL import Image

    pixels = (picture.float().nan_to_num().clamp(0, 1) * 255).round().byte().cpu()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.movedim(0, -1).numpy()
    image = Image.fromarray(array)
    kind = "png"
    if max(image.size) > EXACT:
        kind, image = "jpeg", image.convert("RGB")
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=92)
    return in_page(buffer.getvalue(), kind)


def in_page(data: bytes, kind: str = "png") -> str:
    """An encoded image as an address that needs no file."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png_width(png: bytes) -> int:
    """Pixels, from the header of a PNG."""
    return int.from_bytes(png[16:20], "big")
