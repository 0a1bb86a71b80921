"""A forecasting method of your own: what it needs is a row of coefficients per skipped step.

python examples/own_forecaster.py
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import lesa


@dataclass(frozen=True)
class DampedTrend:
    """h_s = h_p + (d + d^2 + ... + d^k) (h_p - h_q) / (p - q): a straight line that tires.

    p and q are the last two full steps, k = s - p, d = `damping`. With d = 1 it is Taylor's line,
    with d = 0 reuse. After the damped trend of Gardner and McKenzie (1985).
    """

    damping: float = 0.9

    name, uses_latent, tap = "damped-trend", False, None  # any tap, no latent as a regressor

    def history(self, schedule: lesa.Schedule) -> int:
        """K, how many features of full steps are kept."""
        return min(2, len(schedule.full_steps))

    def table(self, schedule: lesa.Schedule, sigmas: Sequence[float], branch: str) -> lesa.Table:
        """`sigmas` are the noise levels of the run, for methods that go by them."""

        def row(step: int, cached: tuple[int, ...]) -> list[float]:
            if len(cached) < 2:
                return [1.0]
            last, before = cached  # newest first
            reach = sum(self.damping**k for k in range(1, step - last + 1)) / (last - before)
            return [1 + reach, -reach]

        return lesa.Table.from_rows(schedule, self.history(schedule), row)


# or: FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16).to("cuda")
pipe = lesa.testbed.load()
call = lesa.testbed.settings() | {"prompt": lesa.testbed.captions(3), "output_type": "pt"}


def generate() -> torch.Tensor:
    noise = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return pipe(generator=noise, **call).images.cpu().float()  # [3, 3, H, W]


plain = generate()
for method in (lesa.Reuse(), lesa.Taylor(order=1), DampedTrend(0.9), DampedTrend(0.8)):
    with lesa.accelerate(pipe, method, schedule=lesa.Schedule.every(6)):
        psnr = -10 * (generate() - plain).square().mean(dim=(1, 2, 3)).log10()
        steps = lesa.stats(pipe)
    print(f"{len(steps.full_steps)} of {steps.num_steps}: {psnr.mean():.1f} dB, {method}")
