"""Three public pipelines at full size with random weights: what time and memory depend on.

Sizes and scheduler settings are those of the models' published configurations; pictures are noise.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lesa.cli.inputs import quieten
from lesa.evaluation.flops import published

Shape = tuple["int | str", ...]  # a name stands for that field of the transformer's configuration


@dataclass(frozen=True)
class Model:
    """One row: classes, configurations, the default call, and the inputs that encoders would make.

    `layers` are the fields that count blocks, `masks` inputs that are all ones, `share` the part of
    the blocks that the benchmarks keep by default so as to end in time.
    """

    pipeline: str
    transformer: str
    config: dict[str, Any]
    scheduler: dict[str, Any]
    layers: tuple[str, ...]
    call: dict[str, Any]
    inputs: dict[str, Shape]
    masks: dict[str, Shape] = field(default_factory=dict)
    share: float = 1.0
    tiny: dict[str, Any] = field(default_factory=dict)
    tiny_call: dict[str, Any] = field(default_factory=dict)


_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "pooled_projection_dim": 32}
MODELS = {
    "flux.1-dev": Model(
        pipeline="FluxPipeline",
        transformer="FluxTransformer2DModel",
        config=published("flux.1-dev").config,
        scheduler={
            "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
            "base_image_seq_len": 256, "max_image_seq_len": 4096,
        },
        layers=("num_layers", "num_single_layers"),
        call={"height": 1024, "width": 1024, "guidance_scale": 3.5},
        inputs={
            "prompt_embeds": (1, 512, "joint_attention_dim"),
            "pooled_prompt_embeds": (1, "pooled_projection_dim"),
        },
        tiny={
            **_SMALL, "in_channels": 16, "joint_attention_dim": 32, "num_layers": 2,
            "num_single_layers": 2, "axes_dims_rope": (4, 6, 6),
        },
        tiny_call={"height": 64, "width": 64},
    ),
    "qwen-image": Model(
        pipeline="QwenImagePipeline",
        transformer="QwenImageTransformer2DModel",
        config=published("qwen-image").config,
        scheduler={
            "shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9,
            "base_image_seq_len": 256, "max_image_seq_len": 8192, "shift_terminal": 0.02,
        },
        layers=("num_layers",),
        call={"height": 1328, "width": 1328, "true_cfg_scale": 4.0},  # two calls a step
        inputs={
            "prompt_embeds": (1, 128, "joint_attention_dim"),
            "negative_prompt_embeds": (1, 16, "joint_attention_dim"),
        },
        masks={"prompt_embeds_mask": (1, 128), "negative_prompt_embeds_mask": (1, 16)},
        share=0.25,
        tiny={
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16,
            "out_channels": 4, "joint_attention_dim": 32, "num_layers": 2,
            "axes_dims_rope": (4, 6, 6),
        },
        tiny_call={"height": 64, "width": 64},
    ),
    "hunyuan-video": Model(
        pipeline="HunyuanVideoPipeline",
        transformer="HunyuanVideoTransformer3DModel",
        config=published("hunyuanvideo").config,
        scheduler={"shift": 7.0},
        layers=("num_layers", "num_single_layers"),
        call={"height": 480, "width": 640, "num_frames": 65, "guidance_scale": 6.0},
        inputs={
            "prompt_embeds": (1, 256, "text_embed_dim"),
            "pooled_prompt_embeds": (1, "pooled_projection_dim"),
        },
        masks={"prompt_attention_mask": (1, 256)},
        share=0.15,
        tiny={
            **_SMALL, "in_channels": 4, "out_channels": 4, "text_embed_dim": 32, "num_layers": 2,
            "num_single_layers": 2, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6),
        },
        tiny_call={"height": 64, "width": 64, "num_frames": 5},
    ),
}  # fmt: skip


def build(
    name: str, device: torch.device, *, share: float | None = None, tiny: bool = False
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A pipeline without encoders and decoder, the arguments of its call, and what was built.

    Args:
        share: part of the blocks to keep, at least one of each kind; the model's own if None.
        tiny: a model for the logic of a benchmark, in fp32; its numbers mean nothing.
    """
    quieten()
    row = MODELS[name]
    config = {**row.config, **(row.tiny if tiny else {})}
    if not tiny:
        kept = row.share if share is None else share
        config |= {key: max(1, round(kept * config[key])) for key in row.layers}
    dtype = torch.float32 if tiny else torch.bfloat16
    transformer = _random(getattr(diffusers, row.transformer), config, device, dtype)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**row.scheduler)
    pipeline = getattr(diffusers, row.pipeline)
    parts = {"transformer": transformer, "scheduler": scheduler}
    absent = [key for key in inspect.signature(pipeline).parameters if key not in parts]
    pipe = pipeline(**parts, **dict.fromkeys(absent))
    pipe.set_progress_bar_config(disable=True)
    call = row.call | (row.tiny_call if tiny else {})
    facts = {
        "model": name,
        "blocks": {key: [config[key], row.config[key]] for key in row.layers},  # built, of all
        "full_size": not tiny and all(config[key] == row.config[key] for key in row.layers),
        "weights": "random",
        "weight_bytes": sum(p.nbytes for p in transformer.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "call": call,
    }
    return pipe, call | _inputs(row, config, device, dtype), facts


def _random(
    kind: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Made without memory, then filled on the device: matrices small, gains one, biases zero."""
    with init_empty_weights():  # leaves tensors that are no parameters, such as tables of angles
        model = kind(**config).to(dtype)
    if buffers := [name for name, _ in model.named_buffers()]:
        raise SystemExit(f"{kind.__name__} has buffers that nothing would fill: {buffers}")
    model = model.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.constant_(parameter, float(name.endswith("weight")))
    return model


def _inputs(
    row: Model, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    draw = torch.Generator(device).manual_seed(1)

    def sizes(shape: Shape) -> list[int]:
        return [config[size] if isinstance(size, str) else size for size in shape]

    made = {
        name: torch.randn(sizes(shape), generator=draw, device=device, dtype=dtype)
        for name, shape in row.inputs.items()
    }
    masks = {
        name: torch.ones(sizes(shape), dtype=torch.long, device=device)
        for name, shape in row.masks.items()
    }
    return made | masks
