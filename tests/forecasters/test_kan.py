import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lesa.errors import LesaError
from lesa.forecasters.kan import (
    KAN,
    MLP,
    EdgeSplineLayer,
    RidgeSpline,
    bspline_basis,
    ending_basis,
)

GRID = (-3.0, 3.0)


def cox_de_boor(x, intervals, grid):
    """The textbook recursion on uniform knots extended by three on each side."""
    low, high = grid
    width = (high - low) / intervals
    knots = [low + (j - 3) * width for j in range(intervals + 7)]

    def basis(j, degree):
        if degree == 0:
            return 1.0 if knots[j] <= x < knots[j + 1] else 0.0
        left = (x - knots[j]) / (knots[j + degree] - knots[j]) * basis(j, degree - 1)
        right = knots[j + degree + 1] - x
        return left + right / (knots[j + degree + 1] - knots[j + 1]) * basis(j + 1, degree - 1)

    return torch.tensor([basis(j, 3) for j in range(intervals + 3)], dtype=torch.float64)


@settings(deadline=None)
@given(x=st.floats(-2.99, 2.99), intervals=st.integers(1, 9))
def test_closed_form_matches_cox_de_boor(x, intervals):
    basis = bspline_basis(torch.tensor(x, dtype=torch.float64), intervals, GRID)
    assert (basis - cox_de_boor(x, intervals, GRID)).abs().max() < 1e-12


@settings(deadline=None)
@given(x=st.floats(-20, 20), intervals=st.integers(1, 9))
def test_splines_that_end_match_cox_de_boor_outside_the_grid_too(x, intervals):
    basis = ending_basis(torch.tensor(x, dtype=torch.float64), intervals, GRID)
    assert (basis - cox_de_boor(x, intervals, GRID)).abs().max() < 1e-12


def test_partition_of_unity_with_four_active_splines_also_outside_the_grid():
    basis = bspline_basis(torch.linspace(-9, 9, 500, dtype=torch.float64), 5, GRID)
    assert (basis.sum(-1) - 1).abs().max() < 1e-14
    assert int((basis != 0).sum(-1).max()) == 4


def test_gradient_of_the_basis():
    x = torch.tensor([-2.9, -1.2, 0.1, 2.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: bspline_basis(v, 5, GRID), x)


def test_edge_layer_is_a_sum_of_one_spline_and_one_silu_per_edge():
    layer = EdgeSplineLayer(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for n in range(4):
        for o in range(2):
            for i in range(3):
                basis = bspline_basis(x[n, i], 5, GRID)
                expected[n, o] += layer.base[o, i].detach() * nn.functional.silu(x[n, i])
                expected[n, o] += layer.spline[o, i].detach() @ basis
    torch.testing.assert_close(layer(x).detach(), expected, rtol=0, atol=1e-12)


def test_edge_layer_goes_on_linearly_outside_the_grid():
    layer = EdgeSplineLayer(1, 1).double()
    far = layer(torch.tensor([[20.0], [30.0], [40.0]], dtype=torch.float64)).detach().flatten()
    assert abs(far[0] - 2 * far[1] + far[2]) < 1e-6
    assert abs(far[2] - far[0] - 20 * layer.base.item()) < 1e-6


def test_ridge_is_a_sum_of_splines_of_projections():
    ridge = RidgeSpline(6, nodes=5).double()
    nn.init.normal_(ridge.output)
    x = torch.randn(3, 6, dtype=torch.float64)
    z = x @ ridge.projection.T + ridge.shift
    expected = torch.zeros(3, 1, dtype=torch.float64)
    for m in range(5):
        phi = bspline_basis(z[:, m], 5, GRID) @ ridge.spline[m]
        phi = phi + ridge.base[m] * nn.functional.silu(z[:, m])
        expected[:, 0] += (ridge.output[m] * phi).detach()
    torch.testing.assert_close(ridge(x).detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "net", [KAN([4, 8, 2]), RidgeSpline(4, nodes=8), MLP([4, 8, 2])], ids=["edge", "ridge", "mlp"]
)
def test_starts_at_zero_and_learns(net):
    x = torch.randn(5, 4)
    assert not net(x).any()
    net(x).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half()])
def test_half_precision_casts_are_ignored_inside_a_parent(cast):
    parent = cast(nn.ModuleDict({"gate": KAN([2, 3, 1]), "other": nn.Linear(2, 2)}))
    assert {p.dtype for p in parent["gate"].parameters()} == {torch.float32}
    assert parent["other"].weight.dtype not in (torch.float32, torch.float64)
    assert {p.dtype for p in parent.double()["gate"].parameters()} == {torch.float64}


def test_half_precision_cast_keeps_every_bit():
    layer = EdgeSplineLayer(2, 2)
    before = layer.spline.detach().clone()
    assert torch.equal(layer.to(torch.bfloat16).spline, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KAN([4]),
        lambda: EdgeSplineLayer(1, 1, intervals=0),
        lambda: RidgeSpline(1, grid=(1.0, 1.0)),
    ],
)
def test_bad_shapes_are_refused(make):
    with pytest.raises(LesaError, match="="):
        make()
