"""What block-level peers must know of a model: its token grid and its first and last block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lesa.errors import LesaError
from lesa.evaluation.method import Bench
from lesa.hooks.denoiser import Denoiser
from lesa.hooks.model_specs import ModelSpec
from lesa.hooks.pipeline import find_denoiser
from lesa.hooks.wrappers import core_of

Arguments = tuple[Denoiser, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Layout:
    """One class of denoiser.

    grid: the arguments of a call -> (height, width) of its picture or video frame in tokens.
    modulated: (first block, tokens [B, L, C], time embedding [B, C]) -> what its attention gets.
    picture: place of the picture's tokens in what a block returns.
    """

    grid: Callable[[Arguments], tuple[int, int]]
    modulated: Callable[[Any, Tensor, Tensor], Tensor]
    picture: int


def layout_of(model: nn.Module) -> Layout | None:
    """The row of a denoiser, None where its class has none."""
    names = [cls.__name__ for cls in type(core_of(model)).__mro__]
    return next((_LAYOUTS[name] for name in names if name in _LAYOUTS), None)


def known_layout(model: nn.Module) -> Layout:
    """The row of a denoiser; LesaError where its class has none."""
    layout = layout_of(model)
    if layout is None:
        raise LesaError(f"model: {type(core_of(model)).__name__} {_UNKNOWN}")
    return layout


def unfit_layout(bench: Bench) -> str | None:
    """Why a peer that looks into the blocks cannot run on this bench, or None."""
    if bench.pipe is None:
        return "needs a pipeline"
    model = find_denoiser(bench.pipe)
    name = type(core_of(model)).__name__
    return None if layout_of(model) else f"cannot run here: {name} {_UNKNOWN}"


def first_block(core: nn.Module, spec: ModelSpec) -> Any:
    """The block that runs first."""
    return all_blocks(core, spec)[0]


def last_block(core: nn.Module, spec: ModelSpec) -> Any:
    """The block that runs last."""
    return all_blocks(core, spec)[-1]


def bound_arguments(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a block's forward by name, however it was called."""
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    extra = [name for name in ("args", "kwargs") if name in bound]
    named = {name: value for name, value in bound.items() if name not in extra}
    return named | bound.get("kwargs", {})


def all_blocks(core: nn.Module, spec: ModelSpec) -> list[Any]:
    """The blocks in the order in which they run."""
    return [block for path in spec.blocks for block in core.get_submodule(path).children()]


def _grid_of_ids(call: Arguments) -> tuple[int, int]:
    """FLUX: `img_ids` [L, 3] hold row and column behind their first number."""
    ids = call[0].argument("img_ids", *call[1:])
    rows, columns = (ids.reshape(-1, ids.shape[-1])[:, 1:3].amax(0) + 1).tolist()
    return int(rows), int(columns)


def _grid_of_shapes(call: Arguments) -> tuple[int, int]:
    """Qwen-Image: `img_shapes` hold (frames, height, width) of every picture of a sample."""
    _, rows, columns = call[0].argument("img_shapes", *call[1:])[0][0]
    return rows, columns


def _grid_of_patches(call: Arguments) -> tuple[int, int]:
    """HunyuanVideo: the latent [B, C, F, H, W] in patches."""
    core: Any = core_of(call[0].model)
    rows, columns = call[0].latent(*call[1:]).shape[-2:]
    return rows // core.config.patch_size, columns // core.config.patch_size


def _adaptive_norm(block: Any, tokens: Tensor, time: Tensor) -> Tensor:
    return block.norm1(tokens, emb=time)[0]


def _qwen_norm(block: Any, tokens: Tensor, time: Tensor) -> Tensor:
    shift, scale, _ = block.img_mod(time).chunk(2, dim=-1)[0].chunk(3, dim=-1)
    return block.img_norm1(tokens) * (1 + scale[:, None]) + shift[:, None]


_UNKNOWN = "has no layout of FLUX, Qwen-Image or HunyuanVideo; leave it out"
_LAYOUTS = {
    "FluxTransformer2DModel": Layout(_grid_of_ids, _adaptive_norm, 1),
    "QwenImageTransformer2DModel": Layout(_grid_of_shapes, _qwen_norm, 1),
    "HunyuanVideoTransformer3DModel": Layout(_grid_of_patches, _adaptive_norm, 0),
}
