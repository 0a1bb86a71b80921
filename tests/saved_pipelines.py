"""Pipelines as a user finds them on disk: written by save_pretrained, tokenizers and all.

Weights are random and tiny; the vocabularies are those of the embedded captions, so nothing is
downloaded. `save("sd15", folder)` returns the options that a call of it needs on a command line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from lesa_testbed.text import clip_encoder, clip_tokenizer, t5_tokenizer
from tiny_pipelines import ROWS, Row
from transformers import (
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 16  # of CLIP; T5 in SD3 is as wide as both of its CLIPs together


def save(name: str, folder: Path) -> list[str]:
    """Write the pipeline `name`; the options of its call."""
    torch.manual_seed(0)
    cls, parts, options = _MADE[name]()
    cls(**parts).save_pretrained(folder)
    return options


def _sd15() -> tuple[type, dict, list[str]]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    shipped = diffusers.PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    tokenizer = clip_tokenizer()
    parts = {
        "unet": unet,
        "vae": ROWS["sdxl"]()[1]["vae"],
        "scheduler": shipped,
        "tokenizer": tokenizer,
        "text_encoder": clip_encoder(tokenizer, WIDTH),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    return diffusers.StableDiffusionPipeline, parts, _size(8)


def _sd3() -> tuple[type, dict, list[str]]:
    parts = _of("sd3")
    config = {**parts["transformer"].config, "pooled_projection_dim": 2 * WIDTH}
    parts["transformer"] = diffusers.SD3Transformer2DModel.from_config(config)
    tokenizer = clip_tokenizer()
    for number in ("", "_2"):
        parts[f"tokenizer{number}"] = tokenizer
        parts[f"text_encoder{number}"] = clip_encoder(
            tokenizer, WIDTH, cls=CLIPTextModelWithProjection
        )
    parts |= _t5("_3", 2 * WIDTH)
    return diffusers.StableDiffusion3Pipeline, parts, [*_size(8), *_set("max_sequence_length=20")]


def _pixart() -> tuple[type, dict, list[str]]:
    options = _set("use_resolution_binning=False", "clean_caption=False")
    return diffusers.PixArtSigmaPipeline, _of("pixart") | _t5("", 32), [*_size(8), *options]


def _wan() -> tuple[type, dict, list[str]]:
    tokenizer = t5_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=1
    )
    parts = _of("wan") | {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(config)}
    return (
        diffusers.WanPipeline,
        parts,
        [*_size(32), "--frames", "9", *_set("max_sequence_length=20")],
    )


def _of(name: str) -> dict:
    """The parts of a tiny pipeline, which come without encoders of text."""
    row: Row = ROWS[name]()
    return dict(row[1])


def _t5(number: str, width: int) -> dict:
    tokenizer = t5_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, num_heads=4, d_ff=width, num_layers=1
    )
    return {f"tokenizer{number}": tokenizer, f"text_encoder{number}": T5EncoderModel(config)}


def _size(pixels: int) -> list[str]:
    return ["--height", str(pixels), "--width", str(pixels)]


def _set(*pairs: str) -> list[str]:
    return [text for pair in pairs for text in ("--set", pair)]


_MADE: dict[str, Callable[[], tuple[type, dict, list[str]]]] = {
    "sd15": _sd15,
    "sd3": _sd3,
    "pixart": _pixart,
    "wan": _wan,
}
