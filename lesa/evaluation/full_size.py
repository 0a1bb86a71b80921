"""Published models at full size: configurations as constants, and what one call of each is given.

A configuration names what differs from the class's defaults, and the fields that count its blocks.
Paper: LESA, arXiv 2602.20497.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lesa.errors import LesaError

Arguments = dict[str, Any]
_PATCH = 16  # pixels of a token, each way: 8 in the autoencoder, 2 in the patch
_FRAMES = 4  # frames of a video per latent frame, after the first one


@dataclass(frozen=True)
class Size:
    """Pixels and, for a video, frames."""

    height: int
    width: int
    frames: int | None = None

    def changed(self, height: int | None, width: int | None, frames: int | None) -> Size:
        """With what is given in place; LesaError where the model cannot make it."""
        if frames is not None and self.frames is None:
            raise LesaError(f"frames={frames}: a model of pictures takes none; leave it out")
        size = Size(height or self.height, width or self.width, frames or self.frames)
        for name, pixels in (("height", height), ("width", width)):
            if pixels is not None and (pixels < _PATCH or pixels % _PATCH):
                raise LesaError(f"{name}={pixels}: not a multiple of {_PATCH}; give one")
        if frames is not None and (frames < 1 or frames % _FRAMES != 1):
            raise LesaError(f"frames={frames}: not 1 more than a multiple of {_FRAMES}; give 65")
        return size

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent frames, and rows and columns of tokens."""
        frames = 1 if self.frames is None else (self.frames - 1) // _FRAMES + 1
        return frames, self.height // _PATCH, self.width // _PATCH

    @property
    def tokens(self) -> int:
        """Tokens of the picture or video; of a U-Net those of its outermost attention."""
        frames, rows, columns = self.grid
        return frames * rows * columns


@dataclass(frozen=True)
class FullSize:
    """A published model, and the run that the paper counts.

    text: tokens of the prompt, for each call that a step makes. batch: rows of one call. layers:
    block container -> the field of `config` with its length. paper: TFLOPs by number of full steps.
    adapter_rank: of the low-rank adapter that the paper leaves unfused. note: how to read `paper`.
    """

    kind: str
    source: str
    config: dict[str, Any]
    inputs: Callable[[FullSize, Size, int], Arguments]
    size: Size
    text: tuple[int, ...]
    num_steps: int
    full_steps: tuple[int, ...]
    paper: dict[int, float] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)
    batch: int = 1
    adapter_rank: int = 0
    note: str = ""

    def build(self) -> nn.Module:
        """The denoiser on the meta device, with one block in each of the containers."""
        import diffusers

        with torch.device("meta"):
            kind = getattr(diffusers, self.kind)
            return kind(**self.config | dict.fromkeys(self.layers.values(), 1))

    def arguments(self, size: Size, text: int) -> Arguments:
        """What the denoiser is called with, on the meta device."""
        return self.inputs(self, size, text)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _flux(row: FullSize, size: Size, text: int) -> Arguments:
    return {
        "hidden_states": _meta(1, size.tokens, row.config["in_channels"]),
        "encoder_hidden_states": _meta(1, text, row.config["joint_attention_dim"]),
        "pooled_projections": _meta(1, row.config["pooled_projection_dim"]),
        "timestep": _meta(1),
        "guidance": _meta(1) if row.config["guidance_embeds"] else None,
        "img_ids": _meta(size.tokens, 3),
        "txt_ids": _meta(text, 3),
    }


def _qwen(row: FullSize, size: Size, text: int) -> Arguments:
    return {
        "hidden_states": _meta(1, size.tokens, row.config["in_channels"]),
        "encoder_hidden_states": _meta(1, text, row.config["joint_attention_dim"]),
        "timestep": _meta(1),
        "img_shapes": [[size.grid]],
    }


def _hunyuan(row: FullSize, size: Size, text: int) -> Arguments:
    frames, rows, columns = size.grid
    return {
        "hidden_states": _meta(1, row.config["in_channels"], frames, 2 * rows, 2 * columns),
        "encoder_hidden_states": _meta(1, text, row.config["text_embed_dim"]),
        "encoder_attention_mask": _meta(1, text),
        "pooled_projections": _meta(1, row.config["pooled_projection_dim"]),
        "timestep": _meta(1),
        "guidance": _meta(1),
    }


def _sdxl(row: FullSize, size: Size, text: int) -> Arguments:
    _, rows, columns = size.grid
    return {
        "sample": _meta(row.batch, row.config["in_channels"], 2 * rows, 2 * columns),
        "timestep": _meta(1),
        "encoder_hidden_states": _meta(row.batch, text, row.config["cross_attention_dim"]),
        "added_cond_kwargs": {
            "text_embeds": _meta(row.batch, 1280),  # the pooled vector of the second encoder
            "time_ids": _meta(row.batch, 6),
        },
    }


_CALFLOPS = (
    "The paper's tool also counts work on single elements: its FLOPs are 1.002 times twice its"
    " multiply-accumulates (1859.62 T, its table 8), which are what is counted here."
)
_DOUBLE_SINGLE = {
    "transformer_blocks": "num_layers",
    "single_transformer_blocks": "num_single_layers",
}
_FLUX = FullSize(
    kind="FluxTransformer2DModel",
    source="black-forest-labs/FLUX.1-dev, transformer/config.json",
    config={
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    inputs=_flux,
    size=Size(1024, 1024),
    text=(512,),
    num_steps=50,
    full_steps=(13, 10, 8),
    paper={50: 3726.87, 13: 969.11, 10: 745.51, 8: 596.44},
    layers=_DOUBLE_SINGLE,
    note=_CALFLOPS,
)  # fmt: skip
_QWEN = FullSize(
    kind="QwenImageTransformer2DModel",
    source="Qwen/Qwen-Image, transformer/config.json",
    config={
        "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    inputs=_qwen,
    size=Size(1328, 1328),
    text=(20, 6),
    num_steps=50,
    full_steps=(10, 8),
    paper={50: 12917.56, 10: 2584.90, 8: 2068.03},
    layers={"transformer_blocks": "num_layers"},
    note="Both guidance branches are counted, as in the paper. It states no length of the text:"
    " 20 tokens stand for a DrawBench prompt, 6 for the empty negative one; 10 more add 0.1 %.",
)  # fmt: skip
MODELS: dict[str, FullSize] = {
    "flux.1-dev": _FLUX,
    "flux.1-schnell": replace(
        _FLUX,
        source="black-forest-labs/FLUX.1-schnell, transformer/config.json",
        config=_FLUX.config | {"guidance_embeds": False},
        text=(256,),
        num_steps=4,
        full_steps=(2, 1),
        paper={4: 278.41, 2: 139.21, 1: 69.61},
    ),
    "qwen-image": _QWEN,
    "qwen-image-lightning": replace(
        _QWEN,
        source="Qwen/Qwen-Image with the adapter lightx2v/Qwen-Image-Lightning, 8 steps",
        size=Size(1024, 1024),
        text=(20,),
        num_steps=8,
        full_steps=(5, 4, 2),
        paper={8: 560.96, 5: 350.61, 4: 280.49, 2: 140.25},
        adapter_rank=64,
        note="One guidance branch. The paper's text says 1328 x 1328, its numbers are those of its"
        " code: 1024 x 1024, with the adapter (rank 64) computed beside the weights. The deviation"
        " in brackets counts it too; fused, it costs nothing.",
    ),
    "hunyuanvideo": FullSize(
        kind="HunyuanVideoTransformer3DModel",
        source="hunyuanvideo-community/HunyuanVideo, transformer/config.json",
        config={
            "in_channels": 16, "out_channels": 16, "num_layers": 20, "num_single_layers": 40,
            "num_refiner_layers": 2, "attention_head_dim": 128, "num_attention_heads": 24,
            "text_embed_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
            "patch_size": 2, "patch_size_t": 1, "rope_theta": 256.0, "rope_axes_dim": (16, 56, 56),
        },
        inputs=_hunyuan,
        size=Size(480, 640, 65),
        text=(256,),
        num_steps=50,
        full_steps=(10, 9),
        paper={50: 29773.0, 10: 5960.4, 9: 5354.9},
        layers=_DOUBLE_SINGLE,
    ),
    "sdxl": FullSize(
        kind="UNet2DConditionModel",
        source="stabilityai/stable-diffusion-xl-base-1.0, unet/config.json",
        config={
            "in_channels": 4, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        inputs=_sdxl,
        size=Size(1024, 1024),
        text=(77,),
        num_steps=50,
        full_steps=(17, 10, 5),
        batch=2,
        note="Both guidance branches, in one call. The paper reports no FLOPs for this model; the"
        " default numbers of full steps are those of DeepCache at intervals 3, 5 and 10.",
    ),
}  # fmt: skip
