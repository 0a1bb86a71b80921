"""Many prompts on many GPUs: every process takes its share, and starting again goes on.

torchrun --nproc_per_node 2 examples/batch_torchrun.py

`torchrun -m lesa generate` does the same without a script, with a manifest (docs/scaling.md).
"""

import os
import time
from pathlib import Path

import torch

import lesa

rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"

# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to(device)
pipe = lesa.testbed.load().to(device)
call = lesa.testbed.settings()
prompts = lesa.testbed.captions(8)  # or Path("prompts.txt").read_text().splitlines()
lesa.enable(pipe, full_steps=10)  # or lesa.enable(pipe, "my-lesa", full_steps=10)

folder = Path("lesa-examples/batch")
folder.mkdir(parents=True, exist_ok=True)
start, made = time.perf_counter(), 0
for number in range(rank, len(prompts), processes):
    file = folder / f"{number:04d}.png"
    if file.exists():  # made before, by however many processes
        continue
    noise = torch.Generator().manual_seed(number)  # the picture does not depend on who makes it
    picture = pipe(prompts[number], generator=noise, **call).images[0]
    unfinished = file.with_suffix(".part")
    picture.save(unfinished, "png")
    unfinished.rename(file)  # a file with its final name is complete
    made += 1

seconds, stats = time.perf_counter() - start, lesa.stats(pipe)
print(
    f"process {rank} of {processes} on {device}: {made} pictures in {seconds:.1f} s, "
    f"{stats.full} calls of the model computed, {stats.skipped} forecast"
)
