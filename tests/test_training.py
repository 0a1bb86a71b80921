"""Training against the truth: inner products, least squares, the engine's accelerated runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lesa
from lesa.errors import LesaError
from lesa.schedule import Schedule
from lesa.testbed import captions, load, settings
from lesa.training.closed_loop import Lane, run_lanes, take_rows
from lesa.training.collect import collect
from lesa.training.search import OpenLoop, balanced, climb, search_schedule, starts
from lesa.training.statistics import Statistics, gram

STEPS = 12


@pytest.fixture(scope="module")
def pipe():
    return load("flux")


@pytest.fixture(scope="module")
def call():
    return {key: value for key, value in settings("flux").items() if key != "num_inference_steps"}


@pytest.fixture(scope="module")
def statistics(pipe, call):
    return collect(pipe, captions(3), STEPS, batch_size=2, call=call)


def reuse(schedule, sigmas, branch):
    rows = torch.zeros(schedule.num_steps, 4, dtype=torch.float64)
    rows[list(schedule.skipped_steps), 0] = 1
    return rows


def test_gram_equals_float64_inner_products_in_any_chunking():
    basis = torch.randn(5, 1001)
    exact = basis.double() @ basis.double().T / 1001
    for chunk in (7, 5 * 100, 1 << 20):
        torch.testing.assert_close(gram(basis, chunk), exact, rtol=1e-12, atol=1e-12)


def test_statistics_survive_a_file_and_damage_is_told(tmp_path, statistics):
    path = tmp_path / "statistics-12.safetensors"
    statistics.save(path)
    again = Statistics.load(path)
    assert again.prompts == statistics.prompts and again.sigmas == statistics.sigmas
    torch.testing.assert_close(again.grams["cond"], statistics.grams["cond"], rtol=0, atol=0)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LesaError, match="statistics-12.safetensors.*collect again"):
        Statistics.load(path)


def test_collect_does_not_depend_on_batches_and_leaves_no_trace(pipe, call, statistics):
    single = collect(pipe, captions(3), STEPS, batch_size=1, call=call)
    torch.testing.assert_close(single.grams["cond"], statistics.grams["cond"], rtol=1e-4, atol=1e-6)
    assert type(pipe.transformer).__mro__[1].__name__ == "ModelMixin"


def test_euler_latents_are_sums_of_velocities(statistics):
    """x_{s+1} = x_s + dsigma v_s, so that combination of basis vectors has no energy."""
    for step in range(STEPS - 1):
        c = torch.zeros(statistics.size, dtype=torch.float64)
        c[statistics.latent(step + 1)], c[statistics.latent(step)] = 1, -1
        c[step] = statistics.sigmas[step] - statistics.sigmas[step + 1]
        assert c @ statistics.mean("cond") @ c < 1e-9


def test_interrupted_collection_resumes_to_the_same_statistics(pipe, call, statistics, tmp_path):
    calls = 0

    def interrupt(self, step, timestep, kwargs):
        nonlocal calls
        calls += 1
        if calls > STEPS + 3:
            raise KeyboardInterrupt
        return {}

    options = dict(batch_size=1, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        collect(
            pipe, captions(3), STEPS, call={**call, "callback_on_step_end": interrupt}, **options
        )
    assert len(Statistics.load(tmp_path / f"statistics-{STEPS}.safetensors").prompts) == 1
    finished = collect(pipe, captions(3), STEPS, call=call, **options)
    assert finished.prompts == captions(3)
    torch.testing.assert_close(
        finished.grams["cond"], statistics.grams["cond"], rtol=1e-4, atol=1e-6
    )


def test_continuing_with_other_prompts_is_refused(pipe, call, tmp_path):
    collect(pipe, captions(1), STEPS, call=call, folder=tmp_path)
    with pytest.raises(LesaError, match="other prompts or settings"):
        collect(pipe, captions(2, seed=9), STEPS, call=call, folder=tmp_path)


def test_open_loop_coefficients_are_least_squares(statistics):
    judge = OpenLoop(statistics, history=2, ridge=0.0)
    indices, weights = judge.coefficients("cond", 7, (5, 3))
    root = torch.linalg.cholesky(
        statistics.mean("cond") + 1e-12 * torch.eye(statistics.size)
    ).T.numpy()
    exact = np.linalg.lstsq(root[:, indices], root[:, 7], rcond=None)[0]
    np.testing.assert_allclose(weights, exact, rtol=1e-3, atol=1e-5)


def test_search_beats_every_start_and_its_neighbours(statistics):
    judge = OpenLoop(statistics, history=3)
    found = search_schedule(statistics, 5).full_steps
    assert len(found) == 5 and found[0] == 0
    assert all(judge.quality(found) >= judge.quality(start) for start in starts(5, STEPS))
    assert climb(found, STEPS, judge.quality)[0] == found


def test_balanced_weighs_the_tail():
    flat, spread = torch.full((10,), 30.0), torch.tensor([33.0] * 9 + [10.0])
    assert spread.mean() > flat.mean() and balanced(spread) < balanced(flat)


@pytest.mark.parametrize("count", (0, STEPS + 1))
def test_impossible_count_is_told(statistics, count):
    with pytest.raises(LesaError, match=f"full_steps={count}"):
        search_schedule(statistics, count)


def test_take_rows_reduces_batched_tensors_only():
    batched, ids, scalar = (
        torch.arange(6).reshape(6, 1),
        torch.arange(18).reshape(6, 3),
        torch.tensor(1.0),
    )
    args, kwargs = take_rows(
        ((batched,), {"img_ids": ids, "t": scalar, "extra": {"text": [batched]}}),
        [1, 4],
        6,
        ("img_ids",),
    )
    assert (
        args[0].flatten().tolist() == [1, 4] and kwargs["img_ids"] is ids and kwargs["t"] is scalar
    )
    assert kwargs["extra"]["text"][0].flatten().tolist() == [1, 4]


def test_lanes_are_what_the_engine_does(pipe, call):
    """The engine ends where a frozen lane ended; a lane of full steps is the base run."""
    prompts, schedule = captions(2), Schedule.explicit((0, 2, 5, 9), STEPS)
    lanes = [Lane(schedule, 3, frozen=True), Lane(schedule, 3), Lane(Schedule.every(1, STEPS), 3)]
    run_lanes(pipe, prompts, lanes, reuse, num_inference_steps=STEPS, call=call)
    assert lanes[2].score.min() > 80  # float32 noise of another batch size
    assert balanced(lanes[1].score) > balanced(lanes[0].score)
    generators = lambda: [torch.Generator().manual_seed(row) for row in range(2)]  # noqa: E731
    plain = pipe(
        prompts, num_inference_steps=STEPS, generator=generators(), output_type="latent", **call
    ).images
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=schedule):
        fast = pipe(
            prompts, num_inference_steps=STEPS, generator=generators(), output_type="latent", **call
        ).images
    plain, fast = plain.double().flatten(1), fast.double().flatten(1)
    score = -10 * torch.log10((plain - fast).square().mean(1) / plain.square().mean(1))
    torch.testing.assert_close(score, lanes[0].score, rtol=0, atol=0.01)
