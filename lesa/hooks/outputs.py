"""What a denoiser returns, read as one tensor and made again of one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

__all__ = [
    "ListOf",
    "WithVariance",
    "as_batch",
    "has_variance",
    "kind_of",
    "make_output",
    "read_sample",
    "without_variance",
]


def read_sample(output: Any) -> torch.Tensor | None:
    """The one tensor of a model output (tensor, 1-tuple or `.sample`), or None if it has others. A
    list with a tensor of the same shape for every picture is one batch."""
    return as_batch(_inside(output))


def _inside(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, (tuple, dict)) and len(output) != 1:
        return None
    return output[0] if isinstance(output, tuple) else getattr(output, "sample", None)


def as_batch(value: Any) -> torch.Tensor | None:
    """A tensor as it is, a list of tensors of one shape and dtype as one tensor, else None."""
    if isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, list) or not all(isinstance(part, torch.Tensor) for part in value):
        return None
    alike = len({(part.shape, part.dtype, part.device) for part in value}) == 1
    return torch.stack(value) if alike else None


class ListOf(NamedTuple):
    """The kind of an output of class `kind` that holds a list with a tensor for every picture."""

    kind: Any


class WithVariance(NamedTuple):
    """The kind of an output whose sample is followed by a variance that its loop drops."""

    kind: Any


def has_variance(sample: torch.Tensor, latent: Any) -> bool:
    """Whether a sample ``[rows, 2 C, ...]`` of a latent ``[rows, C, ...]`` holds a learned variance
    in its second half (PixArt, DiT)."""
    if not isinstance(latent, torch.Tensor) or sample.ndim < 4 or sample.ndim != latent.ndim:
        return False
    rows, channels, *others = latent.shape
    return sample.shape == (rows, 2 * channels, *others)


def without_variance(sample: torch.Tensor, latent: Any) -> torch.Tensor:
    """The sample without the variance behind it; itself where there is none."""
    return sample[:, : latent.shape[1]] if has_variance(sample, latent) else sample


def kind_of(output: Any) -> type | ListOf:
    """What `make_output` has to know of an output."""
    return ListOf(type(output)) if isinstance(_inside(output), list) else type(output)


def make_output(kind: Any, sample: torch.Tensor) -> Any:
    """An output of a kind (see `kind_of`) around `sample`: the inverse of `read_sample`."""
    if isinstance(kind, WithVariance):
        return make_output(kind.kind, torch.cat([sample, torch.zeros_like(sample)], dim=1))
    if isinstance(kind, ListOf):
        parts: Any = list(sample.unbind(0))
        return (parts,) if issubclass(kind.kind, tuple) else kind.kind(sample=parts)
    if issubclass(kind, torch.Tensor):
        return sample
    return (sample,) if issubclass(kind, tuple) else kind(sample=sample)
