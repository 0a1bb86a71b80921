"""Real diffusers pipelines for the tests: small, with random weights, nothing downloaded."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lesa import backend, native

ROOT = Path(__file__).parents[1]


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


@pytest.fixture(scope="session")
def native_kernels(request: pytest.FixtureRequest) -> None:
    """The library of csrc/cpu as loaded already, or built once into pytest's cache."""
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if native.load("cpu"):
        newest = max(path.stat().st_mtime for path in sources)
        if native.library("cpu").stat().st_mtime < newest:
            pytest.fail(f"{native.library('cpu')} is older than csrc/: build it again")
        return
    content = b"".join(path.read_bytes() for path in (ROOT / "setup.py", *sources))
    digest = hashlib.sha256(content + torch.__version__.encode()).hexdigest()[:16]
    folder = request.config.cache.mkdir("lesa_native") / digest
    if not (folder / "lesa" / "_native_cpu.so").exists():
        _build(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESA_NATIVE_DIR", str(folder / "lesa"))
        native.why_not.cache_clear()
        assert not native.why_not("cpu")
    backend.why_not.cache_clear()
    backend._active.cache_clear()


def _build(folder: Path) -> None:
    """Into `folder`, which appears complete or not at all."""
    begun = folder.with_suffix(f".{os.getpid()}")
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={begun}"]
    done = subprocess.run(
        [*command, f"--build-temp={begun / 'objects'}"],
        cwd=ROOT,
        env={**os.environ, "LESA_BUILD_EXT": "1", "NVCC": "not-here"},
        capture_output=True,
        text=True,
    )
    if "LESA_BUILD_EXT is 1, but" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    shutil.rmtree(begun / "objects")
    begun.replace(folder)
