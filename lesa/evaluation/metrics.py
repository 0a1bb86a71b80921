"""How far apart two batches of pictures are, one number per picture."""

from __future__ import annotations

from math import log10

import torch
from torch import Tensor

from lesa.errors import LesaError
from lesa.util.numerics import float64
from lesa.util.perceptual import check, psnr

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def frame_psnr(reference: Tensor, videos: Tensor) -> Tensor:
    """PSNR in dB of every frame, [N, F, ...] -> [N, F] float64; a video's worst frame may be far
    below its whole-video `psnr`.

    Raises: LesaError if the shapes differ or the videos are not floats.
    """
    check(reference, videos)
    return psnr(reference.flatten(0, 1), videos.flatten(0, 1)).reshape(reference.shape[:2])


def temporal_psnr(reference: Tensor, videos: Tensor) -> Tensor:
    """PSNR in dB of the frame differences, 10 log10(1 / mean((da - db)^2)) with
    da_f = a_{f+1} - a_f: sees flicker, not what is constant in time. [N, F, ...] -> [N] float64,
    infinite where motion is identical.

    Raises: LesaError if the shapes differ, the videos are not floats or have a single frame.
    """
    check(reference, videos)
    if reference.shape[1] < 2:
        raise LesaError("videos: a single frame has no motion; give at least 2 frames")
    return psnr(float64(reference).diff(dim=1), float64(videos).diff(dim=1))


def psnr_u8wrap(reference: Tensor, images: Tensor) -> Tensor:
    """The PSNR column of the paper's FLUX and Qwen tables, kept only to stand beside those rows.

    The paper's release subtracts and squares uint8 arrays, which wrap modulo 256. The mean of
    d^2 mod 256 over random d is 105.5, so it reads about 27.9 dB however different two pictures
    are, and every large error looks smaller than it is. Do not judge by it: use `psnr`.
    """
    check(reference, images)
    difference = _to_uint8(reference) - _to_uint8(images)  # uint8: wraps, on purpose
    squared = float64(difference * difference).flatten(1).mean(1)
    return 20 * log10(255) - 10 * torch.log10(squared)


def ssim(reference: Tensor, images: Tensor) -> Tensor:
    """Structural similarity of the grey pictures, [N, 3, H, W] in [0, 1] -> [N], at most 1.

    Videos [N, F, 3, H, W] give the mean over their frames. Computed by torchmetrics (Gaussian
    window of 11, sigma 1.5).

    Raises: LesaError if the shapes differ or torchmetrics is not installed.
    """
    check(reference, images)
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise LesaError(
            f"ssim: torchmetrics is not usable ({error}); run pip install '.[report]'"
        ) from None
    scores = structural_similarity_index_measure(
        _grey(images), _grey(reference), data_range=1.0, reduction="none"
    )
    assert isinstance(scores, Tensor)
    return scores.reshape(len(images), -1).mean(1)


def _to_uint8(images: Tensor) -> Tensor:
    return (float64(images).clamp(0, 1) * 255).round().to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(LUMA, device=images.device)[:, None, None]
    frames = images.float().flatten(0, -4)  # [N (* F), 3, H, W]
    return (frames * weights).sum(1, keepdim=True)
