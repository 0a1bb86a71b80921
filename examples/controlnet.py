"""With a ControlNet: it still runs at every step, and lesa notices when it is switched off.

python examples/controlnet.py
"""

import time

import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline

import lesa

# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
base = lesa.testbed.load()


def stand_in() -> FluxControlNetModel:
    """An untrained ControlNet; for FLUX.1-dev load one by `FluxControlNetModel.from_pretrained`."""
    names = "num_attention_heads", "attention_head_dim"
    sizes = {name: base.transformer.config[name] for name in names}
    made = FluxControlNetModel.from_transformer(base.transformer, 1, 1, **sizes)
    draw = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        if name.startswith("controlnet_"):  # they begin as zeros, which would change nothing
            torch.nn.init.normal_(weight, std=0.02, generator=draw)
    return made.to(base.device, base.dtype).eval()


pipe = FluxControlNetPipeline.from_pipe(base, controlnet=stand_in(), dtype=base.dtype)
pipe.set_progress_bar_config(disable=True)
call = lesa.testbed.settings() | {"control_image": torch.rand(1, 3, 64, 64), "output_type": "pt"}


def generate(**options: float) -> tuple[torch.Tensor, float]:
    """A picture [1, 3, H, W] and the seconds that it took."""
    noise, start = torch.Generator().manual_seed(1), time.perf_counter()
    picture = pipe("a large blue square", generator=noise, **call, **options).images
    return picture.cpu().float(), time.perf_counter() - start


generate()  # the first call of a process is slower
for title, options in {
    "control over all steps": {"controlnet_conditioning_scale": 0.7},
    "control over half of them": {"control_guidance_end": 0.5},
}.items():
    plain, plain_seconds = generate(**options)
    with lesa.accelerate(pipe, full_steps=10):
        fast, fast_seconds = generate(**options)
        stats = lesa.stats(pipe)
    psnr = -10 * (plain - fast).square().mean().log10()
    print(
        f"{title}: {stats.full} calls computed, {stats.skipped} forecast, "
        f"{plain_seconds / fast_seconds:.1f} times as fast, PSNR {psnr:.1f} dB"
    )
    for reason, count in stats.fallbacks.items():
        print(f"  computed all the same, {count}: {reason}")
