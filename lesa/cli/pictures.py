"""Pictures and videos as files: PNG, mp4, and names that tell the prompt."""

from __future__ import annotations

import io
import tempfile
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lesa.util.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NO_VIDEO", "file_name", "picture_png", "save", "video_mp4"]

NO_VIDEO = "no mp4: it needs imageio and imageio-ffmpeg; run `pip install 'imageio[ffmpeg]'`"
_LONGEST = 120  # bytes of a name: file systems end at 255, of which a temporary name needs more


def save(image: Tensor, folder: Path, name: str, fps: int) -> list[Path]:
    """Write a picture [3, H, W] in [0, 1] as PNG; a video [F, 3, H, W] as a strip of its frames,
    and as mp4 where imageio is installed."""
    files = [write_atomically(folder / f"{name}.png", picture_png(image))]
    if image.ndim == 4 and can_write_videos():
        files.append(write_atomically(folder / f"{name}.mp4", video_mp4(image, fps)))
    return files


def picture_png(image: Tensor) -> bytes:
    """[3, H, W] in [0, 1] as PNG; a video [F, 3, H, W] as its frames side by side."""
    from PIL import Image

    if image.ndim == 4:
        image = image.movedim(0, -2).flatten(-2)  # [3, H, F * W]
    pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def can_write_videos() -> bool:
    """Whether the packages that write mp4 are installed."""
    return find_spec("imageio") is not None and find_spec("imageio_ffmpeg") is not None


def video_mp4(video: Tensor, fps: int) -> bytes:
    """[F, 3, H, W] in [0, 1] as mp4 (H.264, whose sizes are even), by diffusers."""
    from diffusers.utils import export_to_video

    frames = list(video.clamp(0, 1).movedim(1, -1).numpy())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        export_to_video(frames, str(path), fps=fps, macro_block_size=2)
        return path.read_bytes()


def file_name(number: int, prompt: str) -> str:
    """A name without ending: the number, then letters and digits of the prompt in any script."""
    text = unicodedata.normalize("NFC", prompt).lower()
    # Vowel signs of Indic scripts are marks, no letters, and belong to their letter.
    kept = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
    slug = "-".join("".join(kept).split()).encode()[:_LONGEST].decode(errors="ignore")
    return f"{number:04d}-{slug.strip('-') or 'prompt'}"
