"""torch.compile of the model or of its blocks, before and after `enable`; attention backends."""

from __future__ import annotations

import warnings
from functools import partial

import diffusers
import pytest
import torch
from tiny_pipelines import build, run
from user_checks import at_step, new_fallbacks

import lesa
from lesa import Schedule, Taylor
from lesa.hooks.attach import attached

THIRD = Schedule.fora(3)  # of six steps 0 and 3 are full


class Graphs(list):
    """A backend that runs each graph as it is and keeps it."""

    def __call__(self, graph, example_inputs):
        self.append(graph)
        return graph.forward


@pytest.fixture
def graphs():
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def enable(pipe, tap):
    lesa.enable(pipe, Taylor(1), schedule=THIRD, tap=tap)


def wrap(pipe, **options):
    pipe.transformer = torch.compile(pipe.transformer, **options)


WAYS = {
    "model.compile": lambda pipe, backend: pipe.transformer.compile(
        fullgraph=True, backend=backend
    ),
    "torch.compile": lambda pipe, backend: wrap(pipe, fullgraph=True, backend=backend),
    "blocks": lambda pipe, backend: pipe.transformer.compile_repeated_blocks(
        fullgraph=True, backend=backend
    ),
}


@pytest.mark.parametrize(
    "way, order, tap",
    [
        ("model.compile", "before", "hidden"),
        ("model.compile", "after", "output"),
        ("torch.compile", "before", "hidden"),
        ("blocks", "before", "hidden"),
        ("blocks", "after", "output"),
    ],
)
def test_compiled_before_or_after_enable(tiny_flux, inputs, way, order, tap, graphs):
    """Of the model one graph for full and one for skipped steps; of the blocks one per class."""
    plain = run(tiny_flux, inputs(steps=6))
    enable(tiny_flux, tap)
    expected = run(tiny_flux, inputs(steps=6))
    lesa.disable(tiny_flux)
    if order == "before":
        WAYS[way](tiny_flux, graphs)
    enable(tiny_flux, tap)
    if order == "after":
        WAYS[way](tiny_flux, graphs)
    for _ in range(2):
        torch.testing.assert_close(run(tiny_flux, inputs(steps=6)), expected)
    found = lesa.stats(tiny_flux)
    assert (found.full, found.skipped, found.fallbacks) == (4, 8, {})
    assert 0 < len(graphs) <= 2
    lesa.disable(tiny_flux)
    torch.testing.assert_close(run(tiny_flux, inputs(steps=6)), plain)


def test_torch_compile_after_enable_says_what_to_do(graphs, tiny_flux, inputs):
    pipe, call = tiny_flux, partial(inputs, steps=6)
    plain = run(pipe, call())
    enable(pipe, "hidden")
    expected = run(pipe, call())
    wrap(pipe, backend=graphs)
    with pytest.warns(UserWarning, match="compile first and enable then, or use model.compile"):
        assert torch.equal(run(pipe, call()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(run(pipe, call()), expected)
    assert not graphs  # the controller is not traced, so nothing can be compiled again and again
    assert lesa.stats(pipe).fallbacks == {}  # found inside of the compiled one
    lesa.enable(pipe, Taylor(1), schedule=THIRD, tap="hidden")  # now around it: the remedy
    torch.testing.assert_close(run(pipe, call()), expected)
    assert graphs
    lesa.disable(pipe)
    torch.testing.assert_close(run(pipe, call()), plain)


def test_torch_compile_after_enable_is_undone_by_disable(graphs, tiny_flux, inputs):
    pipe, call = tiny_flux, partial(inputs, steps=6)
    plain, core = run(pipe, call()), pipe.transformer
    enable(pipe, "hidden")
    wrap(pipe, backend=graphs)
    lesa.disable(pipe)
    assert attached(core) is None and type(core) is diffusers.FluxTransformer2DModel
    torch.testing.assert_close(run(pipe, call()), plain)


def test_torch_compile_after_enable_with_fullgraph_names_the_reason(graphs, tiny_flux, inputs):
    pipe, call = tiny_flux, partial(inputs, steps=6)
    enable(pipe, "hidden")
    wrap(pipe, backend=graphs, fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="came after lesa.enable"):
        run(pipe, call())


def test_other_sizes_and_steps_make_no_storm_of_graphs(graphs, tiny_flux, inputs):
    pipe, call = tiny_flux, partial(inputs, steps=6)
    pipe.transformer.compile(fullgraph=True, backend=graphs)
    enable(pipe, "hidden")
    for size in (16, 32, 48):
        run(pipe, call(size=size))
    assert len(graphs) <= 4  # one for a size, then one for any, of full and of skipped steps
    made = len(graphs)
    run(pipe, call(size=64))
    run(pipe, inputs(steps=9))
    assert len(graphs) == made
    assert lesa.stats(pipe).fallbacks == {}


@pytest.fixture
def native_attention():
    """diffusers keeps the backend that was set last for the whole process."""
    yield
    build("flux")[0].transformer.set_attention_backend("native")


def test_an_attention_backend_is_numerics_only(native_attention):
    pipe, call = build("flux")
    enable(pipe, "hidden")
    first = run(pipe, call())
    change = at_step(0, lambda pipe, _: pipe.transformer.set_attention_backend("_native_math"))
    assert new_fallbacks(pipe, call(callback_on_step_end=change)) == {}
    torch.testing.assert_close(run(pipe, call()), first, rtol=1e-4, atol=1e-4)
    pipe.transformer.set_attention_backend("native")
    assert torch.equal(run(pipe, call()), first)
