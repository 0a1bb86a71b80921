"""Train a forecaster on eight prompts, save it, and generate with 10 of 50 steps in full.

python examples/train_and_use.py
"""

import time
from pathlib import Path

import torch

import lesa

# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
pipe = lesa.testbed.load()
call = lesa.testbed.settings()  # height, width, num_inference_steps=50 and others
prompts = lesa.testbed.captions(8, split="train")  # or lines like those that you will generate
folder = Path("lesa-examples/train-and-use")


def generate(prompt: str) -> tuple[torch.Tensor, float]:
    """A picture [1, 3, H, W] and the seconds that it took."""
    noise = torch.Generator().manual_seed(7)
    start = time.perf_counter()
    picture = pipe(prompt, generator=noise, output_type="pt", **call).images.cpu().float()
    return picture, time.perf_counter() - start


forecaster = lesa.train(pipe, prompts, full_steps=10, **call)
forecaster.save_pretrained(folder / "forecaster")

unseen = lesa.testbed.captions(1, split="test")[0]
plain, plain_seconds = generate(unseen)
lesa.enable(pipe, folder / "forecaster", full_steps=10)
fast, fast_seconds = generate(unseen)

psnr = -10 * (plain - fast).square().mean().log10()
print(lesa.stats(pipe))
print(f"{unseen}: {plain_seconds:.2f} s plain, {fast_seconds:.2f} s with lesa")
print(f"{plain_seconds / fast_seconds:.1f} times as fast, PSNR {psnr:.1f} dB against the plain run")

both = pipe.image_processor.pt_to_numpy(torch.cat([plain, fast], dim=3))
pipe.image_processor.numpy_to_pil(both)[0].save(folder / "plain-and-fast.png")
print(f"side by side in {folder / 'plain-and-fast.png'}")
