from __future__ import annotations

import pytest
import torch
from lesa_kernels.config import Config
from lesa_kernels.experimental.fp8 import mix_fp8, push_fp8
from lesa_testbed import reference

TWO = Config(512, 128, 2)
FP8 = torch.float8_e4m3fn


def fill(ring, scales, features, integers, config=TWO):
    for slot, feature in enumerate(features):
        push_fp8(feature, ring, scales, integers(slot), config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_torch(dtype, rand, integers, poisoned, device):
    feature = (rand(3, 5, 63) * 10.0 ** torch.arange(-3, 2, device=device)[:, None]).to(dtype)
    feature[0, 0] = 0
    results = []
    for push in (push_fp8, reference.push_fp8):
        codes, scales = torch.zeros(2, 3, 5, 63, dtype=FP8, device=device), poisoned(2, 15)
        push(feature, codes, scales, integers(1), config=TWO)
        assert not codes[0].view(torch.uint8).any() and scales[0].isnan().all()
        results.append((codes[1].view(torch.uint8), scales[1]))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)
    assert (results[0][0] == results[1][0]).float().mean() > 0.999  # ties, where scales differ


def test_every_code_is_decoded(integers, poisoned, device):
    every = torch.arange(256, dtype=torch.uint8, device=device).view(1, 2, 128).view(FP8)
    finite = every.float().isfinite()
    one = torch.ones(1, 1, device=device)
    scales = torch.ones(1, 2, device=device)
    out = mix_fp8(every, scales, integers(0), one, integers(0), poisoned(2, 128), config=TWO)
    assert torch.equal(out[finite[0]], every[0].float()[finite[0]])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 5, 100), torch.bfloat16), ((5, 1030), torch.float16)]
)
def test_mix_against_the_reference(shape, dtype, rand, integers, poisoned, rounded_once, device):
    codes = torch.zeros(4, *shape, dtype=FP8, device=device)
    scales = poisoned(4, torch.Size(shape[:-1]).numel())
    fill(codes, scales, rand(3, *shape, dtype=dtype), integers)
    slots, table, bias, step = integers(2, 0, 3), rand(2, 4), rand(2), integers(1)
    table[1, 2] = 0  # the slot that was never filled, whose scales are NaN
    options = {"latent": rand(*shape), "bias": bias}
    arguments = (codes, scales, slots, table, step)
    out = mix_fp8(*arguments, poisoned(*shape, dtype=dtype), config=TWO, **options)
    exact = torch.empty(shape, dtype=torch.float64, device=device)
    rounded_once(out, reference.mix_fp8(*arguments, exact, **options), 24)


def test_cost_of_the_format(rand, integers, poisoned, device):
    """e4m3 keeps 3 bits after the leading one: 2^-4 at most, 2.6 % in the mean square."""
    features = rand(2, 4, 8, 96, dtype=torch.bfloat16)
    codes, scales = torch.zeros(2, 4, 8, 96, dtype=FP8, device=device), poisoned(2, 32)
    fill(codes, scales, features, integers)
    table = torch.tensor([[1.0, 0.0]], device=device)
    out = mix_fp8(codes, scales, integers(1, 0), table, integers(0), poisoned(4, 8, 96), config=TWO)
    exact = features[1].float()
    normal = exact.abs() > exact.abs().amax(-1, keepdim=True) * 2**-14
    assert ((out - exact).abs() <= exact.abs() * 2**-4 * 1.001)[normal].all()
    assert 0.02 < float((out - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()) < 0.03
    assert codes.nbytes + scales.nbytes < 0.53 * features.nbytes
