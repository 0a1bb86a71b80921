"""Measure accelerated runs against the plain run of the same prompts and seeds."""

from lesa.evaluation.compare import Comparison, compare
from lesa.evaluation.methods import METHODS, Method, build, parse
from lesa.evaluation.metrics import (
    frame_psnr,
    lpips,
    psnr,
    psnr_u8wrap,
    ssim,
    temporal_psnr,
)

__all__ = [
    "METHODS",
    "Comparison",
    "Method",
    "build",
    "compare",
    "frame_psnr",
    "lpips",
    "parse",
    "psnr",
    "psnr_u8wrap",
    "ssim",
    "temporal_psnr",
]
