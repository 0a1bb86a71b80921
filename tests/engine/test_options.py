"""A budget for one request: whose it is, how long it holds, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import threading

import pytest
import torch

import lesa
from lesa import LesaError, Schedule
from lesa.engine.options import current_options

PLAN = Schedule.explicit([0, 1, 6])


def enabled(pipe):
    """With lesa's own forecaster, which has a list for every count."""
    lesa.enable(pipe, schedule=PLAN)


def full_calls(pipe, call):
    """Full and skipped calls of one run, and its picture."""
    before = lesa.stats(pipe)
    image = pipe(**call).images
    after = lesa.stats(pipe)
    return after.full - before.full, after.skipped - before.skipped, image


def test_a_budget_holds_inside_of_its_block_only(tiny_flux, inputs):
    enabled(tiny_flux)
    *counts, own = full_calls(tiny_flux, inputs())
    assert counts == [3, 9]
    for given, full in (({"full_steps": 5}, 5), ({"target_speedup": 3}, 4)):
        lesa.enable(tiny_flux, **given)
        *counts, alone = full_calls(tiny_flux, inputs())
        enabled(tiny_flux)
        with lesa.options(**given):
            *counts, image = full_calls(tiny_flux, inputs())
        assert counts == [full, 12 - full] and torch.equal(image, alone)
    *counts, again = full_calls(tiny_flux, inputs())
    assert counts == [3, 9] and torch.equal(again, own)
    assert lesa.stats(tiny_flux).fallbacks == {}


def test_an_inner_block_replaces_the_outer_one(tiny_flux, inputs):
    enabled(tiny_flux)
    with lesa.options(full_steps=6):
        with lesa.options(full_steps=4):
            assert full_calls(tiny_flux, inputs())[0] == 4
        with lesa.options():  # nothing given: what the pipeline was enabled with
            assert full_calls(tiny_flux, inputs())[0] == 3
        assert full_calls(tiny_flux, inputs())[0] == 6
    assert current_options() is None


def test_a_generation_keeps_the_budget_that_it_began_with(tiny_flux, inputs):
    enabled(tiny_flux)

    def inside(pipe, i, t, values):
        if i == 2:
            with lesa.options(full_steps=9):
                current_options()
        return values

    assert full_calls(tiny_flux, inputs(callback_on_step_end=inside))[0] == 3


def test_off_is_the_plain_pipeline_and_counted(tiny_flux, inputs):
    plain = tiny_flux(**inputs()).images
    enabled(tiny_flux)
    with lesa.options(off=True):
        *counts, image = full_calls(tiny_flux, inputs())
    found = lesa.stats(tiny_flux)
    assert counts == [0, 0] and torch.equal(image, plain)
    assert (found.off, found.generations, found.fallbacks) == (12, 0, {})
    assert found.as_dict()['lesa_calls_total{kind="off"}'] == 12


def test_a_call_that_is_off_is_not_seen_by_the_run_around_it(tiny_flux, inputs):
    enabled(tiny_flux)
    alone = tiny_flux(**inputs()).images
    kept = []
    keep = tiny_flux.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(kwargs), with_kwargs=True
    )

    def look(pipe, i, t, values):
        if i == 4:
            with lesa.options(off=True):
                pipe.transformer(**kept[0])
        return values

    image = tiny_flux(**inputs(callback_on_step_end=look)).images
    keep.remove()
    assert torch.equal(image, alone)
    assert (lesa.stats(tiny_flux).off, lesa.stats(tiny_flux).fallbacks) == (1, {})


def test_threads_with_budgets_of_their_own_do_not_mix(tiny_flux, inputs):
    """Two pipelines share the accelerated transformer; the two runs meet at every step."""
    enabled(tiny_flux)
    other = type(tiny_flux).from_pipe(tiny_flux, scheduler=copy.deepcopy(tiny_flux.scheduler))
    other.set_progress_bar_config(disable=True)
    budgets, pipes = (5, 4), (tiny_flux, other)
    alone = []
    for budget in budgets:
        with lesa.options(full_steps=budget):
            alone.append(tiny_flux(**inputs()).images)
    assert not torch.equal(*alone)
    meeting, found = threading.Barrier(2, timeout=60), [None, None]

    def meet(pipe, i, t, values):
        meeting.wait()
        return values

    def work(n):
        with lesa.options(full_steps=budgets[n]):
            found[n] = pipes[n](**inputs(callback_on_step_end=meet)).images

    before = lesa.stats(tiny_flux)
    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True))
    after = lesa.stats(tiny_flux)
    assert (after.full - before.full, after.fallbacks) == (sum(budgets), {})


def test_tasks_have_budgets_of_their_own(tiny_flux, inputs):
    enabled(tiny_flux)

    async def request(budget):
        with lesa.options(full_steps=budget):
            await asyncio.sleep(0)  # the other task enters its own block meanwhile
            return full_calls(tiny_flux, inputs())[0]

    async def both():
        return await asyncio.gather(request(5), request(4))

    assert asyncio.run(both()) == [5, 4]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"full_steps": 0}, "full_steps=0: not a whole number >= 1"),
        ({"full_steps": 2.5}, "full_steps=2.5: not a whole number"),
        ({"target_speedup": 0.5}, "target_speedup=0.5: slower than plain"),
        ({"quality": "good"}, "quality='good': not one of"),
        ({"off": 1}, "off=1: not a truth value"),
        ({"off": True, "full_steps": 3}, "full_steps=3 and off=True exclude each other"),
        ({"quality": "best", "full_steps": 3}, "exclude each other"),
    ],
)
def test_a_bad_value_is_refused_at_once(given, told):
    with pytest.raises(LesaError, match=told) as refused:
        lesa.options(**given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"full_steps": 13}, "full_steps=13: the run has 12 steps; give at most 12"),
        ({"target_psnr": 40}, "target_psnr=40: .* train one with lesa.train"),
        ({"target_speedup": 99}, "target_speedup=99: .* at most 12 times faster"),
    ],
)
def test_what_the_run_cannot_have_is_refused_before_its_first_step(
    tiny_flux, inputs, executions, given, told
):
    enabled(tiny_flux)
    counts = executions(tiny_flux.transformer)
    with lesa.options(**given), pytest.raises(LesaError, match=told):
        tiny_flux(**inputs())
    assert not sum(counts.values())
    assert full_calls(tiny_flux, inputs())[:2] == (3, 9)  # nothing of it stays


def test_an_untrained_count_is_told_once(tiny_flux, inputs):
    """As `enable` tells it of a count of the pipeline's own."""
    call = {name: value for name, value in inputs().items() if name.endswith("embeds")}
    call |= {"height": 16, "width": 16}
    quick = {"form": "table", "refine": 0, "polish": 0, "progress": False}
    forecaster = lesa.train(tiny_flux, None, 12, 4, call=call, **quick)
    lesa.enable(tiny_flux, forecaster)
    with lesa.options(full_steps=5):
        with pytest.warns(UserWarning, match="full_steps=5 was not trained"):
            tiny_flux(**inputs())
        assert full_calls(tiny_flux, inputs())[0] == 5
