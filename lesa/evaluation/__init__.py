"""Measure accelerated runs against the plain run of the same prompts and seeds."""

from lesa.evaluation.compare import Comparison, compare
from lesa.evaluation.method import Bench, Method
from lesa.evaluation.methods import NAMES, build, build_all, parse
from lesa.evaluation.metrics import frame_psnr, psnr, psnr_u8wrap, ssim, temporal_psnr
from lesa.util.perceptual import lpips

__all__ = [
    "NAMES",
    "Bench",
    "Comparison",
    "Method",
    "build",
    "build_all",
    "compare",
    "frame_psnr",
    "lpips",
    "parse",
    "psnr",
    "psnr_u8wrap",
    "ssim",
    "temporal_psnr",
]
