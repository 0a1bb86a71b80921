from __future__ import annotations

import pytest
import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from lesa_kernels.config import Config
from lesa_kernels.mix import mix
from lesa_kernels.mix_modulate import mix_modulate
from lesa_testbed import reference

CHUNKED = Config(64, 128, 1)
WHOLE = Config(4096, 128, 2)


@pytest.mark.parametrize(
    ("shape", "dtype", "config"),
    [
        ((2, 3, 200), torch.bfloat16, CHUNKED),
        ((1, 2, 3, 63), torch.float32, CHUNKED),
        ((3, 100), torch.float16, WHOLE),
        ((2, 2, 4097), torch.bfloat16, Config(2048, 128, 1)),
        ((2, 4, 1), torch.float32, WHOLE),
        ((2, 3, 128), torch.bfloat16, CHUNKED),
        ((2, 2, 256), torch.float32, Config(256, 128, 1)),
    ],
)
def test_against_the_reference(
    shape, dtype, config, rand, integers, poisoned, rounded_once, device
):
    ring, slots = rand(4, *shape, dtype=dtype), integers(3, 0, 1)
    table, bias, step = rand(5, 3), rand(5), integers(2)
    scale, shift = rand(5, shape[0], 2 * shape[-1], dtype=dtype).chunk(2, dim=-1)
    arguments, options = (ring, slots, table, step, scale, shift), {"bias": bias, "eps": 1e-5}
    out = mix_modulate(*arguments, poisoned(*shape, dtype=dtype), config=config, **options)
    exact = torch.empty(shape, dtype=torch.float64, device=device)
    reference.mix_modulate(*arguments, exact, **options)
    rounded_once(out, exact, 128)  # 4 deviations, a gain up to 5, a few sums


def test_is_the_tail_of_a_denoiser(rand, integers, poisoned, device):
    """Not further from diffusers' norm in float64 than twice diffusers' norm in bf16 is."""
    torch.manual_seed(0)
    norm = AdaLayerNormContinuous(96, 32, elementwise_affine=False, eps=1e-6).to(device)
    norm = norm.bfloat16()
    ring, table = rand(2, 2, 6, 96, dtype=torch.bfloat16), rand(1, 2)
    slots, step, time = integers(1, 0), integers(0), rand(2, 32, dtype=torch.bfloat16)
    scale, shift = norm.linear(norm.silu(time)).chunk(2, dim=1)
    out = poisoned(2, 6, 96, dtype=torch.bfloat16)
    mix_modulate(ring, slots, table, step, scale.detach(), shift.detach(), out, config=CHUNKED)
    mixed = torch.empty(2, 6, 96, dtype=torch.float64, device=device)
    reference.mix(ring, slots, table, step, mixed)
    eager = norm(mixed.bfloat16(), time).double()
    exact = reference.mix_modulate(ring, slots, table, step, scale, shift, mixed.clone()).detach()
    assert (out.double() - exact).abs().max() <= 2 * (eager - exact).abs().max()
    assert (out.double() - exact).pow(2).mean() <= (eager - exact).pow(2).mean()


@pytest.mark.parametrize("columns", [128, 100])
def test_a_large_mean_costs_no_digits(columns, rand, integers, poisoned, device):
    """Features of 4096 +- 1: a sum of squares minus the squared mean is off by 1 there in fp32."""
    ring = (4096 + torch.round(64 * rand(1, 2, 3, columns)) / 64).contiguous()
    table, zeros = torch.ones(1, 1, device=device), torch.zeros(2, columns, device=device)
    arguments = (ring, integers(0), table, integers(0), zeros, zeros)
    exact = reference.mix_modulate(
        *arguments, torch.empty(2, 3, columns, dtype=torch.float64, device=device)
    )
    out = mix_modulate(*arguments, poisoned(2, 3, columns), config=CHUNKED)
    # the numbers are multiples of 1/64 and their distances from the first one exact
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_first_number_far_from_the_others(rand, integers, poisoned, device):
    """The sums count from it: what is lost grows with the square of its distance."""
    ring, table = rand(1, 1, 2, 3072), torch.ones(1, 1, device=device)
    ring[..., 0] = 1000
    zeros = torch.zeros(1, 3072, device=device)
    arguments = (ring, integers(0), table, integers(0), zeros, zeros)
    exact = reference.mix_modulate(
        *arguments, torch.empty(1, 2, 3072, dtype=torch.float64, device=device)
    )
    out = mix_modulate(*arguments, poisoned(1, 2, 3072), config=CHUNKED)
    # 3072 * 2^-24 of the variance per rounding, and the interpreter adds 48 + 64 times in a row
    torch.testing.assert_close(out.double(), exact, rtol=112 * 3072 * 2**-25, atol=1e-4)


def test_the_feature_too_over_the_evicted_slot(rand, integers, poisoned):
    ring, slots, table = rand(3, 2, 4, 72), integers(2, 1), rand(1, 2)
    scale, shift = rand(2, 72), rand(2, 72)
    plain = mix_modulate(
        ring, slots, table, integers(0), scale, shift, poisoned(2, 4, 72), config=CHUNKED
    )
    feature = mix(ring, slots, table, integers(0), poisoned(2, 4, 72), config=CHUNKED)
    out = mix_modulate(
        ring, slots, table, integers(0), scale, shift, poisoned(2, 4, 72),
        feature=ring[1], config=CHUNKED,
    )  # fmt: skip
    assert torch.equal(out, plain)
    # h is kept as its distance from the row's first number: one more rounding of fp32
    torch.testing.assert_close(ring[1], feature, rtol=0, atol=2**-21)


def test_an_empty_feature(rand, integers):
    out = torch.empty(2, 0, 8, device=rand(1).device)
    arguments = (integers(0), rand(1, 1), integers(0), rand(2, 8), rand(2, 8))
    assert mix_modulate(rand(2, 2, 0, 8), *arguments, out) is out
