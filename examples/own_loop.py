"""A denoiser without its pipeline: a sampling loop of your own, with 10 of 50 steps in full.

python examples/own_loop.py
"""

import time
from itertools import pairwise
from pathlib import Path

import torch

import lesa

# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
pipe = lesa.testbed.load()  # for its parts alone; it is never called
model, vae, steps, side = pipe.transformer, pipe.vae, 50, 8  # patches a side; 64 for 1024 x 1024

uniform = torch.linspace(1, 0, steps + 1)
sigmas = 3 * uniform / (1 + 2 * uniform)  # the noise levels of this loop, shifted by 3
text = {"prompt": "a large red circle on a white background", "prompt_2": None}
with torch.no_grad():
    embeds, pooled, text_ids = pipe.encode_prompt(**text, max_sequence_length=20)  # 512 for FLUX
line = torch.arange(float(side))
places = torch.cartesian_prod(torch.zeros(1), line, line).to(embeds)  # [tokens, (0, row, column)]
prompt = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": text_ids}
prompt |= {"img_ids": places, "guidance": torch.full([1], 3.5).to(embeds)}


@torch.no_grad()
def sample(seed: int) -> torch.Tensor:
    """Euler's method from noise to a picture [1, 3, H, W]."""
    noise = torch.Generator().manual_seed(seed)
    latent = torch.randn(1, side**2, model.config.in_channels, generator=noise).to(embeds)
    for now, after in pairwise(sigmas):
        velocity = model(latent, timestep=now.expand(1).to(embeds), **prompt).sample
        latent = latent + (after - now) * velocity
    pixels = side * 2 * pipe.vae_scale_factor
    unpacked = pipe._unpack_latents(latent, pixels, pixels, pipe.vae_scale_factor)
    return vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor).sample


def timed() -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    return sample(seed=0).cpu().float(), time.perf_counter() - start


sample(seed=0)  # the first call of a process is slower
plain, plain_seconds = timed()
config = lesa.LesaConfig(full_steps=10, num_inference_steps=steps, sigmas=sigmas.tolist())
lesa.apply_lesa_cache(model, config)  # forecaster=... in the config for one that you trained
fast, fast_seconds = timed()
lesa.remove_lesa_cache(model)

psnr = -10 * ((plain - fast) / 2).square().mean().log10()  # the pictures are in [-1, 1]
print(f"{plain_seconds:.2f} s plain, {fast_seconds:.2f} s with lesa, PSNR {psnr:.1f} dB")
file = Path("lesa-examples/own-loop.png")
file.parent.mkdir(exist_ok=True)
pipe.image_processor.postprocess(torch.cat([plain, fast], dim=3))[0].save(file)
print(f"side by side in {file}")
