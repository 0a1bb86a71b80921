"""Real diffusers pipelines for the tests: small, with random weights, nothing downloaded.

Triton is told before anybody imports it: its kernels run in the interpreter where there is no GPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_build import native_kernels as native_kernels

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture
def tiny_flux() -> Any:
    """A FluxPipeline of one double and one single block that takes prompt embeddings."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def inputs() -> Callable[..., dict[str, Any]]:
    """Makes the arguments of a Flux call: the same ones for the same options."""

    def make(
        batch: int = 1,
        steps: int = 12,
        size: int = 16,
        dtype: torch.dtype = torch.float32,
        cfg: bool = False,
        **more: Any,
    ) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(3)
        call = {
            "prompt_embeds": torch.randn(batch, 6, 32, generator=draw).to(dtype),
            "pooled_prompt_embeds": torch.randn(batch, 32, generator=draw).to(dtype),
            "num_inference_steps": steps,
            "height": size,
            "width": size,
            "generator": torch.Generator().manual_seed(7),
            "output_type": "latent",
        }
        if cfg:
            call["negative_prompt_embeds"] = torch.randn(batch, 6, 32, generator=draw).to(dtype)
            call["negative_pooled_prompt_embeds"] = torch.randn(batch, 32, generator=draw).to(dtype)
            call["true_cfg_scale"] = 3.0
        return call | more

    return make


@pytest.fixture
def executions() -> Callable[[Any], Counter[str]]:
    """Counts the real executions of every block of a Flux transformer."""

    def watch(model: Any) -> Counter[str]:
        counts: Counter[str] = Counter()
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for position in range(len(getattr(model, name))):
                label = f"{name}.{position}"
                model.get_submodule(label).register_forward_hook(
                    lambda *_, label=label: counts.update([label])
                )
        return counts

    return watch
