# %% [markdown]
# # A tour of lesa
#
# A diffusers pipeline computes its denoiser at every step, though neighbouring steps are alike.
# lesa computes a few *full* steps and forecasts the others. This notebook uses a small FLUX that
# comes with lesa and needs no download: `pip install ".[examples]" ./testbed` in a checkout.
#
# It is made from `tour.py` by `python examples/make_tour.py`, which runs every cell.

# %%
import time

import matplotlib.pyplot as plt
import torch

import lesa

# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
pipe = lesa.testbed.load()
call = lesa.testbed.settings()  # the arguments of its call: 50 steps, 64 x 64 pixels
prompts = lesa.testbed.captions(3, split="test")
print(*prompts, sep="\n")

# %% [markdown]
# ## The plain pipeline
#
# Three prompts in one call, each with noise of its own. `[3, 3, H, W]`, values in `[0, 1]`.


# %%
def generate():
    noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    start = time.process_time()  # seconds of the CPU; with a GPU time.perf_counter()
    pictures = pipe(prompts, generator=noise, output_type="pt", **call).images.cpu().float()
    return pictures, time.process_time() - start


def show(rows):
    figure, axes = plt.subplots(
        len(rows), len(prompts), figsize=(4.5, 1.6 * len(rows)), squeeze=False
    )
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    figure.tight_layout()
    plt.show()


plain, plain_seconds = generate()
print(f"{plain_seconds:.2f} s of the CPU")
show({"plain": plain})

# %% [markdown]
# ## Without training
#
# One line. Ten of fifty steps are full; the others follow a damped line through the last two of
# them. The call stays as it is.


# %%
def psnr(pictures):
    """Of each picture, in dB against the plain one: above 40 one hardly sees a difference."""
    return -10 * (pictures - plain).square().mean(dim=(1, 2, 3)).log10()


lesa.enable(pipe, full_steps=10)
untrained, seconds = generate()
print(f"{plain_seconds / seconds:.1f} times as fast, PSNR {psnr(untrained).mean():.1f} dB")

# %% [markdown]
# ## Training
#
# lesa runs the plain pipeline on a few prompts, lets lists of full steps race each other, and fits
# the coefficients of the best ones. Of eight prompts it keeps two aside, on which it measures what
# each list is worth. One forecaster serves several numbers of full steps.

# %%
lesa.disable(pipe)
calibration = lesa.testbed.captions(8, split="train")  # like those that will be used, but others
forecaster = lesa.train(pipe, calibration, full_steps=(13, 10, 7), progress=False, **call)
forecaster.save_pretrained("lesa-examples/tour")  # later: lesa.enable(pipe, "lesa-examples/tour")

# %%
lesa.enable(pipe, forecaster, full_steps=10)
trained, seconds = generate()
print(f"{plain_seconds / seconds:.1f} times as fast, PSNR {psnr(trained).mean():.1f} dB")

# %% [markdown]
# ## Side by side
#
# For scale also what ten plain steps give, which cost the same. The last rows are twenty times the
# absolute error of each.

# %%
lesa.disable(pipe)
call["num_inference_steps"] = 10
ten_steps, _ = generate()
call["num_inference_steps"] = 50

rows = {"plain": plain, "10 plain": ten_steps, "untrained": untrained, "trained": trained}
for name, pictures in rows.items():
    print(f"{name:10} {psnr(pictures).mean():5.1f} dB")
errors = {name: (20 * (rows[name] - plain).abs()).clamp(max=1) for name in [*rows][1:]}
show({"plain": plain, "trained, 10 full": trained})
show({f"error, {name}": error for name, error in errors.items()})

# %% [markdown]
# ## What it did
#
# Full and skipped calls of the denoiser, the time of each kind, and the memory of the cache. Where
# lesa is unsure, as when the size changes within a run, it computes the step and counts the reason.

# %%
lesa.enable(pipe, forecaster, full_steps=10)
generate()
print(lesa.stats(pipe))

# %% [markdown]
# ## Choosing full steps
#
# Fewer full steps are faster and farther from the plain run. Training has measured how far.

# %%
counts = (13, 10, 7)
found = {"untrained": [], "trained": []}
for name, method in {"untrained": lesa.Prior(), "trained": forecaster}.items():
    for count in counts:
        with lesa.accelerate(pipe, method, full_steps=count):
            pictures, seconds = generate()
        found[name].append((plain_seconds / seconds, psnr(pictures).mean()))

figure, axis = plt.subplots(figsize=(5, 3))
for name, points in found.items():
    axis.plot(*zip(*points, strict=True), marker="o", label=name)
for count, point in zip(counts, found["trained"], strict=True):
    axis.annotate(f"{count} full", point, textcoords="offset points", xytext=(6, 4))
axis.set(xlabel="times as fast", ylabel="PSNR in dB")
axis.margins(0.15)
axis.legend()
plt.show()

# %% [markdown]
# Instead of a number, say what shall be reached; `stats` tells what was chosen for it. A predicted
# speed-up is that of the denoising: text encoders and VAE take as long as before.

# %%
for target in ({"quality": "best"}, {"target_speedup": 4}, {"target_psnr": 44}):
    lesa.enable(pipe, forecaster, **target)
    _, seconds = generate()
    print(f"{plain_seconds / seconds:.1f} times as fast: {lesa.stats(pipe).chosen}")

# %% [markdown]
# Without lesa the pipeline is what it was, to the last bit.

# %%
lesa.disable(pipe)
again, _ = generate()
print(torch.equal(again, plain))
