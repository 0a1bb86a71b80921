"""The references against what lesa and PyTorch compute by other means."""

from __future__ import annotations

import torch
from lesa_kernels.gate import pack_gate
from lesa_testbed import reference

from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.forecasters.kan import RidgeSpline


def test_mix_is_table_apply(rand, integers, device):
    schedule = Schedule.explicit([0, 1, 4], 6)
    coefficients = torch.zeros(6, 3, dtype=torch.float64)
    coefficients[2:4] = coefficients[5] = torch.tensor([1.5, -0.25, 0.125])
    bias = torch.arange(6) / 8 * coefficients[:, 0].bool()
    table = Table(schedule, coefficients, uses_latent=True, bias=bias)
    ring, latent = rand(2, 4, 8, dtype=torch.bfloat16), rand(4, 8)
    out = torch.empty(4, 8, dtype=torch.float64, device=device)
    reference.mix(
        ring, integers(1, 0), table.coefficients.to(device), integers(3), out,
        latent=latent, bias=table.bias.to(device),
    )  # fmt: skip
    expected = table.apply(ring.flip(0).cpu(), 3, latent=latent.cpu())
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-14)


def test_gate_is_the_ridge_spline_of_lesa():
    torch.manual_seed(0)
    ridge = RidgeSpline(5, 40, 7, (-2.0, 1.5)).double()
    torch.nn.init.normal_(ridge.output)
    tau = torch.randn(20, 5, dtype=torch.float64) * 2
    gate = pack_gate([ridge])
    found = torch.stack([reference.spline_gate(row, gate) for row in tau])
    torch.testing.assert_close(found, ridge(tau)[:, 0].detach(), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_autograd(rand, integers):
    ring, table = rand(3, 4, 6).double(), rand(2, 2, 3).double()
    grad, slots, step = rand(4, 6).double(), integers(2, 0), integers(1)
    ring.requires_grad_()
    table.requires_grad_()
    out = reference.mix_differentiable(ring, slots, table, step)
    by_ring, by_table = torch.autograd.grad(out, (ring, table), grad)
    row, _ = reference.mix_grad_table(grad, ring.detach(), slots, bands=3)
    torch.testing.assert_close(row, by_table[1])
    found = torch.zeros_like(ring)
    reference.mix_grad_features(grad, slots, table.detach(), step, found)
    torch.testing.assert_close(found, by_ring)
