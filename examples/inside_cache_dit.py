"""lesa's full steps and forecasts inside cache-dit, beside its own DBCache.

python examples/inside_cache_dit.py  # needs pip install ".[peers]"
"""

import time

import cache_dit
import torch

import lesa
from lesa.integrations.cache_dit import configs

# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
pipe = lesa.testbed.load()
call = lesa.testbed.settings()
prompt = "a large red circle on a white background"


def generate() -> tuple[torch.Tensor, float]:
    """A picture [1, 3, H, W] and the seconds that it took."""
    noise = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    picture = pipe(prompt, generator=noise, output_type="pt", **call).images.cpu().float()
    return picture, time.perf_counter() - start


generate()  # the first call of a process is slower
plain, plain_seconds = generate()
print(f"{'plain':24} {plain_seconds:6.2f} s")
for name, options in {
    "cache-dit's own DBCache": {"cache_config": cache_dit.DBCacheConfig(Fn_compute_blocks=1)},
    "lesa, 16 full steps": configs(pipe, full_steps=16),  # or configs(pipe, "my-lesa", ...) for
    "lesa, 10 full steps": configs(pipe, full_steps=10),  # one trained with tap="hidden"
}.items():
    cache_dit.enable_cache(pipe, **options)
    picture, seconds = generate()
    cache_dit.disable_cache(pipe)
    psnr = -10 * (plain - picture).square().mean().log10()
    print(f"{name:24} {seconds:6.2f} s, PSNR {psnr:.1f} dB against the plain run")
