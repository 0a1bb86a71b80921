"""A denoiser class of your own: one row tells lesa where its blocks and its tail are.

python examples/own_model.py  # classes of diffusers, as that of FLUX.1-dev, need no row
"""

import time

import torch
from torch import nn

import lesa


class PointDenoiser(nn.Module):
    """The velocity of points in the plane at a noise level; no part has a usual name."""

    def __init__(self, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.entry, self.exit = nn.Linear(3, width), nn.Linear(width, 2)
        self.stages = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, points: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        features = self.entry(torch.cat([points, level.expand(len(points), 1)], dim=1))
        for stage in self.stages:
            features = features + torch.relu(stage(features))
        return self.exit(features)


torch.manual_seed(0)
model = PointDenoiser()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(1000):  # flow matching from noise to a spiral
    turn, noise, level = 9 * torch.rand(256, 1).sqrt(), torch.randn(256, 2), torch.rand(256, 1)
    points = torch.cat([turn.cos(), turn.sin()], dim=1) * turn / 5
    velocity = model(points + level * (noise - points), level)
    optimizer.zero_grad()
    (velocity - (noise - points)).square().mean().backward()
    optimizer.step()
start, levels = torch.randn(2000, 2), torch.linspace(1, 0, 51)  # 50 steps


@torch.no_grad()
def sample() -> tuple[torch.Tensor, float]:
    points, began = start, time.process_time()
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        points = points + (after - now) * model(points, now)
    return points, time.process_time() - began


row = lesa.ModelSpec("PointDenoiser", ("stages",), tail="exit", latent="points", conditioning=())
lesa.register_model(row)
plain, plain_seconds = sample()
for tap in ("output", "hidden"):  # what the model returns, or what its tail gets
    config = lesa.LesaConfig(full_steps=10, tap=tap, num_inference_steps=50, sigmas=levels.tolist())
    lesa.apply_lesa_cache(model, config)
    sample()  # the first call with a tap is slower
    fast, seconds = sample()
    apart = (fast - plain).norm(dim=1).mean()
    print(f"{tap} tap: {plain_seconds / seconds:.1f} times as fast, points {apart:.4f} apart")
