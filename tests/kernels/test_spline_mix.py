from __future__ import annotations

import pytest
import torch
from lesa_kernels.config import Config
from lesa_kernels.gate import fold_times, pack_gate
from lesa_kernels.mix import mix
from lesa_kernels.spline_mix import spline_mix
from lesa_testbed import reference

from lesa.core.schedule import Schedule
from lesa.forecasters.kan import RidgeSpline
from lesa.forecasters.paper import PaperForm
from lesa.forecasters.settings import Settings

TWO = Config(512, 128, 2)
SHAPE = (3, 5, 67)


def gate_of(count, inputs, nodes, intervals, device):
    torch.manual_seed(1)
    ridges = [RidgeSpline(inputs, nodes, intervals) for _ in range(count)]
    for ridge in ridges:
        torch.nn.init.normal_(ridge.output, std=nodes**-0.5)
    gate = pack_gate([ridge.to(device) for ridge in ridges])
    return gate, ridges


@pytest.mark.parametrize(
    ("dtype", "history", "nodes", "intervals"),
    [(torch.float32, 1, 200, 5), (torch.bfloat16, 4, 256, 8), (torch.float16, 8, 16, 1)],
)
def test_against_the_reference(
    dtype, history, nodes, intervals, rand, integers, poisoned, rounded_once, device
):
    gate, _ = gate_of(2, 37, nodes, intervals, device)
    ring = rand(history + 1, *SHAPE, dtype=dtype)
    slots = integers(*(i % (history + 1) for i in range(2, 2 + history)))
    weights, bias, tau, experts = rand(3, history), rand(3), rand(3, 37), integers(0, 1, 1)
    tau[1] *= 4  # beyond the grid at both ends
    arguments = (ring, slots, weights, tau, gate)
    for step in (integers(0), integers(1)):
        options = {"experts": experts, "bias": bias}
        out = poisoned(*SHAPE, dtype=dtype)
        spline_mix(*arguments, step, out, config=TWO, **options)
        exact = torch.empty(SHAPE, dtype=torch.float64, device=device)
        reference.spline_mix(*arguments, step, exact, **options)
        alpha = reference.spline_gate(tau[int(step)], gate, int(experts[int(step)]))
        rounded_once(out, exact, 4 + 8 * history * (4 + float(alpha.abs())))


def test_gate_at_and_beyond_the_grid_ends(rand, integers, poisoned, device):
    """With weight 1 on a feature of ones, out - 1 is the gate's value."""
    gate, ridges = gate_of(1, 1, 32, 5, device)
    ridges[0].projection.data.fill_(1)
    ridges[0].shift.data.zero_()
    gate = pack_gate(ridges)
    places = torch.tensor([-7.0, -3.0, -1.8, 0.0, 0.6, 2.9999, 3.0, 7.0], device=device)[:, None]
    expected = ridges[0](places)[:, 0].detach()
    ring, weights = torch.ones(1, 4, device=device), torch.ones(len(places), 1, device=device)
    for s, value in enumerate(expected):
        out = spline_mix(ring, integers(0), weights, places, gate, integers(s), poisoned(4))
        torch.testing.assert_close(out - 1, value.expand(4), rtol=2e-5, atol=2e-6)


def test_folding_a_schedule_keeps_the_gate(device):
    times = torch.linspace(1, 0, 51, device=device)
    gate, _ = gate_of(3, 51, 256, 5, device)
    folded = fold_times(gate, times)
    assert folded.projection.shape == (3, 1, 256)
    for s, expert in ((0, 0), (17, 1), (49, 2)):
        expected = reference.spline_gate(times[s] - times, gate, expert)
        found = reference.spline_gate(times[s : s + 1], folded, expert)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_fused_equals_the_table_of_the_paper_form(rand, integers, poisoned, device):
    torch.manual_seed(2)
    form = PaperForm(Settings(form="paper", num_steps=10, nodes=64, windows=(2, 3, 3)))
    for name, parameter in form.named_parameters():
        if name.endswith(("output", "w.cond.1", "b.cond")):
            torch.nn.init.normal_(parameter, std=0.2)
    sigmas = torch.linspace(1, 0, 11).double()
    schedule = Schedule.explicit([0, 1, 2, 5], 10)
    table, bias = form.rows(schedule, sigmas.tolist(), "cond")
    stages = [form.stage_of(sigma) for sigma in sigmas[:-1].tolist()]
    weights = torch.stack([form._fitted(form.w["cond"][j], s + 3) for s, j in enumerate(stages)])
    ring, slots = rand(3, 40), integers(1, 0, 2)
    gate = pack_gate([ridge.to(device) for ridge in form.gates["cond"]])
    for step in (3, 8):
        fused = spline_mix(
            ring, slots, weights.float().detach().to(device), form.offsets(sigmas).to(device), gate,
            integers(step), poisoned(40),
            experts=integers(*stages), bias=form.b["cond"].detach()[stages].to(device), config=TWO,
        )  # fmt: skip
        run = mix(
            ring, slots, table.float().detach().to(device), integers(step), poisoned(40),
            bias=bias.float().detach().to(device), config=TWO,
        )  # fmt: skip
        torch.testing.assert_close(fused, run, rtol=1e-5, atol=1e-5)


def test_weightless_slots_are_not_read_and_in_place(rand, integers, rounded_once, device):
    gate, _ = gate_of(1, 3, 16, 5, device)
    ring, slots, step, tau = rand(3, 500), integers(1, 0, 2), integers(0), rand(1, 3)
    ring[2] = torch.nan
    weights = torch.tensor([[0.5, -0.5, 0.0]], device=device)
    alpha = reference.spline_gate(tau[0], gate)
    expected = ring[1].double() + alpha * 0.5 * (ring[1].double() - ring[0].double())
    spline_mix(ring, slots, weights, tau, gate, step, ring[2], config=TWO)
    rounded_once(ring[2], expected, 8 + 8 * float(alpha.abs()))
