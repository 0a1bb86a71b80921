from math import acos, cos, factorial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa import LesaForecaster
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.forecasters import Forecaster, HiCache, Reuse, Spectrum, Taylor
from lesa.forecasters.hicache import hermite

schedules = st.builds(
    lambda full, steps: Schedule.explicit({0, *(s for s in full if s < steps)}, steps),
    st.sets(st.integers(1, 39)),
    st.integers(2, 40),
)


def run(table, features):
    """Forecasts of all skipped steps from true features at the full steps [S, D]."""
    schedule, found = table.schedule, {}
    for s in schedule.skipped_steps:
        cached = schedule.cached_before(s, table.history)
        found[s] = table.apply([features[p] for p in cached], s)
    return found


def features_of(schedule, width=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(schedule.steps, width, dtype=torch.float64, generator=generator)


def seer(schedule, features, order, term):
    """TaylorSeer's update, literally, on feature tensors."""
    state: dict[int, torch.Tensor] = {}
    last, found = 0, {}
    for s in range(schedule.steps):
        if schedule.is_full(s):
            new = {0: features[s]}
            for i in range(order):
                if i in state:
                    new[i + 1] = (new[i] - state[i]) / (s - last)
            state, last = new, s
        else:
            found[s] = sum(term(i, s - last) * f for i, f in state.items())
    return found


def check(found, expected):
    assert found.keys() == expected.keys()
    for s, value in found.items():
        torch.testing.assert_close(value, expected[s], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(), HiCache(), Spectrum()])
def test_protocol_and_short_history(forecaster):
    assert isinstance(forecaster, Forecaster)
    assert (forecaster.uses_latent, forecaster.tap) == (False, None)
    schedule = Schedule.every(4, 4)  # a single full step
    table = forecaster.table(schedule, [1.0, 0.8, 0.5, 0.3, 0.0])
    assert table.history == forecaster.history(schedule) == 1


@pytest.mark.parametrize(
    "make", [Reuse, Taylor, HiCache, Spectrum, lambda: LesaForecaster("paper", num_steps=12)]
)
def test_tables_lie_on_the_host_whatever_the_default_device(make):
    """Users set torch's default device to their GPU; here it is one that holds no numbers."""
    schedule, sigmas = Schedule.explicit([0, 1, 4, 8], 12), [1 - s / 12 for s in range(13)]
    forecaster = make()
    wanted = forecaster.table(schedule, sigmas).coefficients
    with torch.device("meta"):
        assert torch.equal(forecaster.table(schedule, sigmas).coefficients, wanted)


@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(), HiCache(), Spectrum()])
def test_interval_one_makes_an_empty_table(forecaster):
    assert not forecaster.table(Schedule.every(1, 6), []).coefficients.any()


@settings(deadline=None)
@given(schedule=schedules)
def test_reuse_returns_the_last_full_feature(schedule):
    features = features_of(schedule)
    for forecaster in (Reuse(), Taylor(order=0), HiCache(order=0)):
        for s, value in run(forecaster.table(schedule, []), features).items():
            assert torch.equal(value, features[max(p for p in schedule.full_steps if p < s)])


@settings(deadline=None)
@given(schedule=schedules, order=st.integers(0, 4))
def test_taylor_is_taylorseers_recursion(schedule, order):
    features = features_of(schedule)
    found = run(Taylor(order).table(schedule, []), features)
    check(found, seer(schedule, features, order, lambda i, k: k**i / factorial(i)))


@pytest.mark.parametrize("interval", [4, 5, 6, 7, 9])
def test_taylor_on_its_published_schedules(interval):
    schedule = Schedule.taylorseer(interval, 50)
    features = features_of(schedule)
    for order in (1, 2):
        found = run(Taylor(order).table(schedule, []), features)
        check(found, seer(schedule, features, order, lambda i, k: k**i / factorial(i)))


@settings(deadline=None)
@given(schedule=schedules)
def test_order_one_extrapolates_lines_exactly(schedule):
    steps = torch.arange(schedule.steps, dtype=torch.float64)[:, None]
    line = 3 - 0.7 * steps
    for forecaster in (Taylor(1), Taylor(1, exact=True)):
        for s, value in run(forecaster.table(schedule, []), line).items():
            if len(schedule.cached_before(s, 2)) == 2:
                torch.testing.assert_close(value, line[s], rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(schedule=schedules)
def test_exact_order_two_extrapolates_parabolas_exactly(schedule):
    steps = torch.arange(schedule.steps, dtype=torch.float64)[:, None]
    parabola = 3 - 0.7 * steps + 0.05 * steps**2
    for s, value in run(Taylor(2, exact=True).table(schedule, []), parabola).items():
        if len(schedule.cached_before(s, 3)) == 3:
            torch.testing.assert_close(value, parabola[s], rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_taylorseers_order_two_misses_parabolas_by_its_one_sided_difference(interval):
    """On a grid of gap d the first difference is h' - h'' d / 2: the miss is h'' k d / 2."""
    full = [i * interval for i in range(4)]
    schedule = Schedule.explicit(full, full[-1] + 6)
    steps = torch.arange(schedule.steps, dtype=torch.float64)[:, None]
    parabola = 3 - 0.7 * steps + 0.05 * steps**2
    for s, value in run(Taylor(2).table(schedule, []), parabola).items():
        if s > full[-1]:
            miss = 0.1 * (s - full[-1]) * interval / 2
            torch.testing.assert_close(value, parabola[s] - miss, rtol=1e-10, atol=1e-10)


def test_hermite_polynomials():
    x = 0.37
    written_out = [1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x, 16 * x**4 - 48 * x**2 + 12]
    assert [hermite(n, x) for n in range(5)] == pytest.approx(written_out, rel=1e-14)


@settings(deadline=None)
@given(schedule=schedules, order=st.integers(0, 3), sigma=st.floats(0.3, 1.0))
def test_hicache_is_its_formula(schedule, order, sigma):
    features = features_of(schedule)

    def term(i, k):
        x = sigma * k
        h = [1, 2 * x, 4 * x**2 - 2, 8 * x**3 - 12 * x][i]
        return sigma**i * h / factorial(i)

    found = run(HiCache(order, sigma).table(schedule, []), features)
    check(found, seer(schedule, features, order, term))


def spectrum(schedule, features, degree, ridge, weight):
    """Spectrum literally: fit Chebyshev coefficients to features, evaluate, blend with a line."""
    half, found = schedule.steps / 2, {}

    def basis(s):
        x = (s - half) / half
        return [cos(n * acos(x)) for n in range(degree + 1)]

    for s in schedule.skipped_steps:
        cached = [p for p in schedule.full_steps if p < s]
        design = torch.tensor([basis(p) for p in cached], dtype=torch.float64)
        gram = design.T @ design + ridge * torch.eye(degree + 1, dtype=torch.float64)
        theta = torch.linalg.solve(gram, design.T @ features[cached])
        fit = torch.tensor(basis(s), dtype=torch.float64) @ theta
        line = features[cached[-1]]
        if len(cached) > 1:
            p, q = cached[-1], cached[-2]
            line = line + (s - p) / (p - q) * (features[p] - features[q])
        found[s] = weight * fit + (1 - weight) * line
    return found


@settings(deadline=None)
@given(schedule=schedules, degree=st.integers(1, 5), weight=st.floats(0, 1))
def test_spectrum_is_its_formula(schedule, degree, weight):
    features = features_of(schedule)
    found = run(Spectrum(degree, 0.1, weight).table(schedule, []), features)
    check(found, spectrum(schedule, features, degree, 0.1, weight))


def test_spectrum_keeps_every_full_step():
    schedule = Schedule.spectrum(3, 50)
    assert Spectrum().history(schedule) == Spectrum().table(schedule, []).history == 10
    assert Spectrum().history(Schedule.explicit((0, 1, 2, 4), 5)) == 3


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Taylor(5), "order=5"),
        (lambda: Taylor(-1), "order=-1"),
        (lambda: HiCache(2, sigma=0), "sigma=0: not above 0"),
        (lambda: Spectrum(degree=0), "degree=0"),
        (lambda: Spectrum(ridge=0), "ridge=0"),
        (lambda: Spectrum(weight=1.5), "weight=1.5"),
        (lambda: Taylor(True), "order=True: not a whole number"),
        (lambda: Taylor(exact="no"), "exact='no': neither True nor False"),
        (lambda: HiCache(sigma="a"), "sigma='a': not a finite number"),
        (lambda: HiCache(sigma=True), "sigma=True: not a finite number"),
        (lambda: Spectrum(degree=True), "degree=True: not a whole number"),
        (lambda: Spectrum(ridge=None), "ridge=None: not a finite number"),
        (lambda: Spectrum(weight=float("nan")), "weight=nan: not a finite number"),
        (lambda: Taylor().table(Schedule.every(7), []), "bind"),
    ],
)
def test_errors_name_the_field_and_value(make, told):
    with pytest.raises(LesaError, match=told):
        make()
