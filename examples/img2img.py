"""From picture to picture: the full steps are counted among the steps that are really run.

python examples/img2img.py
"""

import time
from pathlib import Path

import torch
from diffusers import FluxImg2ImgPipeline

import lesa

# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
text_to_image = lesa.testbed.load()
# They share the denoiser: enable one, and both are. Without dtype its weights become float32.
pipe = FluxImg2ImgPipeline.from_pipe(text_to_image, dtype=text_to_image.dtype)
pipe.set_progress_bar_config(disable=True)
call = lesa.testbed.settings() | {"output_type": "pt"}

noise = torch.Generator().manual_seed(0)
source = text_to_image("a large red circle on a white background", generator=noise, **call).images


def repaint(strength: float) -> tuple[torch.Tensor, float]:
    """The source repainted, [1, 3, H, W], and the seconds that it took."""
    noise, start = torch.Generator().manual_seed(1), time.perf_counter()
    options = {"image": source, "strength": strength, "generator": noise, **call}
    picture = pipe("a large blue circle on a brown background", **options).images
    return picture.cpu().float(), time.perf_counter() - start


shown = [source.cpu().float()]
for strength in (0.9, 0.7):
    plain, plain_seconds = repaint(strength)
    with lesa.accelerate(pipe, full_steps=8):
        fast, fast_seconds = repaint(strength)
        stats = lesa.stats(pipe)
    psnr = -10 * (plain - fast).square().mean().log10()
    print(
        f"strength {strength}: {len(stats.full_steps)} of {stats.num_steps} steps in full, "
        f"{plain_seconds / fast_seconds:.1f} times as fast, PSNR {psnr:.1f} dB"
    )
    shown += [plain, fast]

file = Path("lesa-examples/img2img.png")
file.parent.mkdir(exist_ok=True)
pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(torch.cat(shown, 3)))[0].save(
    file
)
print(f"source, then plain and fast for each strength, in {file}")
