"""Skipped steps of the hidden tap through graphs; a recorder on the CPU stands in for CUDA's."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import lesa
from lesa import Schedule, Taylor
from lesa.engine.graphs.capture import Recording
from lesa.engine.graphs.step_graphs import StepGraphs
from lesa.engine.graphs.tail_graph import TailBuffers
from lesa.engine.ring import Ring
from lesa.hooks.attach import attached

FULL = Schedule.explicit([0, 1, 2, 5, 9])


class Recorder:
    """Replays by calling the body, which overwrites the output of the last replay."""

    def refusal(self, device):
        return None

    def stream(self, device):
        return 0

    def warm_up(self, body, device):
        return body()

    def capture(self, body, device):
        with torch.inference_mode(False):
            output = body()
        return Recording(Tape(body, output), output)

    def release(self, handle):
        handle.body = None


class Tape:
    replays = 0

    def __init__(self, body, output):
        self.body, self.output = body, output

    def replay(self):
        Tape.replays += 1
        self.output.copy_(self.body())


@pytest.fixture
def graphs(tiny_flux):
    """Enables lesa with graphs, as on a GPU, and gives them."""

    def enable(**options):
        lesa.enable(tiny_flux, Taylor(1), tap="hidden", **{"schedule": FULL, **options})
        controller = attached(tiny_flux.transformer).controller
        controller.tap.graphs = StepGraphs(recorder=Recorder())
        Tape.replays = 0
        return controller.tap.graphs

    return enable


def test_a_replayed_step_gives_what_an_eager_one_gives(tiny_flux, inputs, graphs):
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden", graph="off")
    expected = [tiny_flux(**inputs(cfg=True)).images for _ in range(2)]
    lesa.disable(tiny_flux)
    made = graphs()
    found = [tiny_flux(**inputs(cfg=True)).images for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert dict(made.counts) == {"captured": 4}  # one per branch and call
    assert Tape.replays == 2 * 2 * 7 - 2  # all skipped steps but each branch's warm-up
    assert lesa.stats(tiny_flux).graphs == {"captured": 4} and not lesa.stats(tiny_flux).fallbacks


def test_prompts_lists_and_sizes_change_between_calls(tiny_flux, inputs, graphs):
    other = {"pooled_prompt_embeds": torch.randn(1, 32, generator=torch.Generator().manual_seed(9))}
    calls = [{}, other, {"batch": 2}, {"steps": 10}, {"size": 32}, {}]
    made = graphs(schedule=Schedule.every(4))
    found = [tiny_flux(**inputs(**call)).images for call in calls]
    lesa.enable(tiny_flux, Taylor(1), schedule=Schedule.every(4), tap="hidden", graph="off")
    for call, image in zip(calls, found, strict=True):
        assert torch.equal(tiny_flux(**inputs(**call)).images, image)
    assert made.counts["captured"] == 6


def test_new_weights_are_captured_anew(tiny_flux, inputs, graphs):
    made = graphs()
    tiny_flux(**inputs())
    with torch.no_grad():
        tiny_flux.transformer.proj_out.weight.mul_(1.5)
    changed = tiny_flux(**inputs()).images
    assert dict(made.counts) == {"captured": 2}
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden", graph="off")
    assert torch.equal(tiny_flux(**inputs()).images, changed)


def test_an_offloaded_tail_is_not_captured(tiny_flux, inputs, graphs):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    made = graphs()
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map={})
    tail = tiny_flux.transformer.proj_out
    weights = {name: value.clone() for name, value in tail.state_dict().items()}
    hook.weights_map = {name: value for name, value in weights.items()}
    add_hook_to_module(tail, hook)
    tiny_flux(**inputs())
    assert list(made.counts) == ["refused: accelerate's AlignDevicesHook is on Linear"]
    assert Tape.replays == 0


def test_the_ring_is_the_graphs_own_memory_and_goes_with_the_last_skipped_step(
    tiny_flux, inputs, graphs, monkeypatch
):
    graphs()
    made, alive, init = [], [], TailBuffers.__init__

    def watched(self, *args):
        init(self, *args)
        made.append(weakref.ref(self))

    def note(pipe, i, t, values):
        alive.append(sum(buffers() is not None for buffers in made))
        rings = [x for x in gc.get_objects() if type(x) is Ring]
        assert all(ring.data is buffers().ring for ring, buffers in zip(rings, made, strict=False))
        return values

    monkeypatch.setattr(TailBuffers, "__init__", watched)
    gc.collect()
    gc.disable()
    try:
        tiny_flux(**inputs(callback_on_step_end=note))
    finally:
        gc.enable()
    assert alive == [1] * 11 + [0]  # step 11 is the last skipped one


def test_graph_off_captures_nothing(tiny_flux, inputs):
    lesa.enable(tiny_flux, Taylor(1), schedule=FULL, tap="hidden", graph="off")
    tiny_flux(**inputs())
    assert attached(tiny_flux.transformer).controller.tap.graphs is None
    assert lesa.stats(tiny_flux).graphs == {}
