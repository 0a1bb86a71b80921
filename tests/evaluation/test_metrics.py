"""Metrics against their definitions, and against what is known of the paper's wrapping PSNR."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from lesa.errors import LesaError
from lesa.evaluation import frame_psnr, lpips, psnr, psnr_u8wrap, ssim, temporal_psnr


@pytest.fixture
def pictures():
    return torch.rand(4, 3, 48, 40, generator=torch.Generator().manual_seed(0))


def noisy(pictures, decibels):
    """Pictures at exactly this PSNR, unclamped."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    size = noise.double().square().flatten(1).mean(1).sqrt()[:, None, None, None]
    return (pictures + noise / size * 10 ** (-decibels / 20)).float()


def test_psnr_is_the_definition_for_each_picture(pictures):
    other = pictures.clone()
    for row, step in enumerate((0.1, 0.01, 0.001)):
        other[row] += step
    assert psnr(pictures, other)[:3].tolist() == pytest.approx([20, 40, 60], abs=1e-3)  # fp32 input
    assert psnr(pictures, other)[3] == math.inf


def test_psnr_mean_is_that_of_decibels_not_of_errors(pictures):
    other = pictures.clone()
    other[:2] += torch.tensor([0.1, 0.001])[:, None, None, None]
    assert psnr(pictures[:2], other[:2]).mean().item() == pytest.approx(40, abs=1e-3)


def test_psnr_has_no_floor_at_8_bits(pictures):
    assert psnr(pictures, pictures + 1e-5).max() > 99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_psnr_computes_in_float64_whatever_comes_in(pictures, dtype):
    a, b = pictures.to(dtype), noisy(pictures, 30).to(dtype)
    assert psnr(a, b).dtype == torch.float64
    assert torch.equal(psnr(a, b), psnr(a.double(), b.double()))


def test_the_papers_psnr_cannot_tell_bad_from_worse(pictures):
    """Unrelated pictures read 27.9 dB: the mean of d^2 mod 256 over all d is 105.5."""
    other = torch.rand(4, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    again = torch.rand(4, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    assert psnr(other, again).max() < 9
    expected = 10 * math.log10(255**2 / 105.5)
    assert psnr_u8wrap(other, again).tolist() == pytest.approx([expected] * 4, abs=0.1)


def test_the_papers_psnr_flatters_and_agrees_only_on_small_errors():
    pictures = 0.25 + 0.5 * torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    assert (psnr_u8wrap(pictures, noisy(pictures, 20.7)) > 26).all()
    assert (psnr_u8wrap(pictures, noisy(pictures, 26.8)) > 28).all()
    close = noisy(pictures, 42)  # differences stay below 16, whose squares fit into 8 bits
    assert torch.allclose(psnr_u8wrap(pictures, close), psnr(pictures, close), atol=0.3)


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise(pictures):
    assert ssim(pictures, pictures).tolist() == pytest.approx([1] * 4, abs=1e-5)
    scores = [ssim(pictures, noisy(pictures, d)).mean().item() for d in (40, 30, 20)]
    assert 1 > scores[0] > scores[1] > scores[2] > 0


def test_ssim_of_a_video_is_the_mean_over_its_frames(pictures):
    other = noisy(pictures, 25)
    video = ssim(pictures[None], other[None])
    assert video.tolist() == pytest.approx([ssim(pictures, other).mean().item()], abs=1e-6)


@pytest.mark.parametrize("metric", [psnr, psnr_u8wrap, ssim, lpips])
def test_wrong_input_is_named(pictures, metric):
    with pytest.raises(LesaError, match=r"shape \(3, 3, 48, 40\) differs"):
        metric(pictures, pictures[:3])
    with pytest.raises(LesaError, match="uint8.*output_type='pt'"):
        metric(pictures, (255 * pictures).byte())


def test_ssim_does_not_load_torchvision():
    """Its index wheels do not import beside a CPU-only torch."""
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import torch; from lesa.evaluation.metrics import ssim\n"
        "a = torch.rand(1, 3, 32, 32); assert abs(ssim(a, a).item() - 1) < 1e-5"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_broken_frame_is_seen_in_the_worst_frame_only():
    video = torch.full((2, 5, 3, 8, 8), 0.5)
    other = video.clone()
    other[1, 3] += 0.1
    frames = frame_psnr(video, other)
    assert frames.shape == (2, 5) and frames[1, 3].item() == pytest.approx(20, abs=1e-4)
    assert frames.isinf().sum() == 9
    assert psnr(video, other)[1].item() == pytest.approx(20 + 10 * math.log10(5), abs=1e-4)


def test_motion_ignores_what_is_constant_and_sees_flicker():
    video = torch.rand(1, 6, 3, 8, 8, dtype=torch.float64) / 2
    assert temporal_psnr(video, video + 0.25).item() > 250
    flicker = video.clone()
    flicker[:, ::2] += 0.1  # every difference is off by 0.1
    assert temporal_psnr(video, flicker).item() == pytest.approx(20, abs=1e-6)
    with pytest.raises(LesaError, match="single frame"):
        temporal_psnr(video[:, :1], video[:, :1])
