from __future__ import annotations

import pytest
import torch
from lesa_kernels.config import Config
from lesa_kernels.experimental.mix_backward import mix_grad_features, mix_grad_table
from lesa_testbed import reference

from lesa import ops

TWO = Config(256, 128, 2)
SHAPE = (2, 6, 40)
BANDS = [{}, {"bands": 5}, {"bands": 40}, {"bands": 6, "band_size": 40}]
WIDE = {"bands": 2, "band_size": 600}


@pytest.mark.parametrize("bands", [*BANDS, WIDE])
@pytest.mark.parametrize("with_latent", [False, True])
def test_table_against_the_reference(bands, with_latent, rand, integers):
    shape = (2, 2, 600) if bands is WIDE else SHAPE
    grad, ring = rand(*shape, dtype=torch.bfloat16), rand(4, *shape, dtype=torch.float16)
    options = {"latent": rand(*shape) if with_latent else None, **bands}
    found = mix_grad_table(grad, ring, integers(2, 0, 3), config=TWO, **options)
    exact = reference.mix_grad_table(grad, ring, integers(2, 0, 3), **options)
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 2**-20 * 4 * grad.numel()


@pytest.mark.parametrize("bands", [None, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_against_the_reference(bands, dtype, rand, integers, poisoned, rounded_once):
    grad, table = rand(*SHAPE), rand(2, 3, *([bands] if bands else []))
    slots, step = integers(3, 1), integers(1)
    rings, latents = poisoned(4, *SHAPE, dtype=dtype), poisoned(*SHAPE, dtype=dtype)
    mix_grad_features(grad, slots, table, step, rings, latent_grad=latents, config=TWO)
    exact, exact_latent = torch.zeros_like(rings).double(), torch.zeros_like(latents).double()
    reference.mix_grad_features(grad, slots, table, step, exact, latent_grad=exact_latent)
    for slot in (3, 1):
        rounded_once(rings[slot], exact[slot], 16)
    rounded_once(latents, exact_latent, 16)
    assert rings[0].isnan().all() and rings[2].isnan().all()


@pytest.fixture
def forced(monkeypatch):
    """`ops.mix` on the Triton kernels, interpreted or not."""
    monkeypatch.setenv("LESA_BACKEND", "triton")


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("bands", [None, 8])
def test_autograd_agrees_with_autograd_of_the_reference(bands, rand, integers):
    def leaves(dtype):
        tensors = (ring, table, latent, bias)
        return [tensor.to(dtype).detach().requires_grad_() for tensor in tensors]

    ring, latent = rand(3, 4, 24), rand(4, 24)
    table, bias = rand(2, 3, *([bands] if bands else [])), rand(2, *([bands] if bands else []))
    slots, step, weight = integers(2, 0), integers(1), rand(4, 24)
    gradients = []
    for function, dtype in (
        (ops.mix, torch.float32),
        (reference.mix_differentiable, torch.float64),
    ):
        r, t, x, b = parameters = leaves(dtype)
        out = function(r, slots, t, step, latent=x, bias=b)
        gradients.append(torch.autograd.grad((out * weight).pow(2).sum(), parameters))
    for found, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("forced")
def test_a_fit_by_gradients_finds_the_coefficients(rand, integers):
    ring, slots, step = rand(2, 300), integers(1, 0), integers(0)
    target = 2 * ring[1] - ring[0]
    table = torch.tensor([[1.0, 0.0]], device=ring.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([table], max_iter=4)

    def loss():
        optimiser.zero_grad()
        value = (ops.mix(ring, slots, table, step) - target).pow(2).mean()
        value.backward()
        return value

    optimiser.step(loss)
    torch.testing.assert_close(table.detach().cpu(), torch.tensor([[2.0, -1.0]]), atol=1e-3, rtol=0)
