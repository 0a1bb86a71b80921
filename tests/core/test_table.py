import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa.core.schedule import Schedule
from lesa.core.table import Table
from lesa.errors import LesaError

SCHEDULE = Schedule.explicit((0, 1, 4), 8)


def valid_rows(schedule, history, latent=False, autoregressive=False):
    torch.manual_seed(0)
    rows = torch.randn(schedule.num_steps, history + latent, dtype=torch.float64)
    for s in range(schedule.num_steps):
        held = s if autoregressive else len(schedule.cached_before(s, history))
        rows[s, min(held, history) : history] = 0
        rows[s] *= not schedule.is_full(s)
    return rows


@settings(deadline=None)
@given(
    full=st.sets(st.integers(1, 19)),
    history=st.integers(1, 8),
    latent=st.booleans(),
    autoregressive=st.booleans(),
    biased=st.booleans(),
    data=st.data(),
)
def test_apply_is_the_weighted_sum_of_what_the_ring_holds(
    full, history, latent, autoregressive, biased, data
):
    schedule = Schedule.explicit({0, *full}, 20)
    rows = valid_rows(schedule, history, latent, autoregressive)
    bias = torch.randn(20).double() if biased else None
    if bias is not None:
        bias[list(schedule.full_steps)] = 0
    table = Table(schedule, rows, latent, bias, autoregressive)
    assert table.history == history
    if not schedule.skipped_steps:
        return
    step = data.draw(st.sampled_from(schedule.skipped_steps))
    pushed = range(step) if autoregressive else [s for s in schedule.full_steps if s < step]
    features = {s: torch.randn(2, 3, dtype=torch.float64) for s in pushed}
    x = torch.randn(2, 3, dtype=torch.float64)
    held = [features[s] for s in sorted(pushed)[::-1]][:history]
    assert table.available(step) == len(held)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for k, feature in enumerate(held):
        expected += rows[step, k] * feature
    if latent:
        expected += rows[step, -1] * x
    if bias is not None:
        expected += bias[step]
    got = table.apply(held, step, x if latent else None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_apply_accepts_a_stacked_ring_and_upcasts():
    table = Table(SCHEDULE, valid_rows(SCHEDULE, 2))
    ring = torch.randn(2, 5, dtype=torch.bfloat16)
    got = table.apply(ring, 6)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, table.row(6) @ ring.double(), rtol=0, atol=1e-14)


def test_coefficients_are_a_float64_copy():
    rows = valid_rows(SCHEDULE, 2).float().requires_grad_()
    table = Table(SCHEDULE, rows)
    rows.data.fill_(7)
    assert table.coefficients.dtype == torch.float64
    assert not table.coefficients.requires_grad
    assert (table.coefficients != 7).all()


def test_from_rows_pads_to_the_history():
    seen = {}

    def row(step, cached):
        seen[step] = cached
        return [float(s) for s in cached]

    table = Table.from_rows(SCHEDULE, 3, row)
    assert seen == {2: (1, 0), 3: (1, 0), 5: (4, 1, 0), 6: (4, 1, 0), 7: (4, 1, 0)}
    assert table.row(2).tolist() == [1, 0, 0]
    assert table.row(5).tolist() == [4, 1, 0]
    assert not table.coefficients[[0, 1, 4]].any()


@pytest.mark.parametrize("uses_latent", [False, True])
def test_trimmed_tables_drop_columns_that_no_row_uses(uses_latent):
    table = Table(SCHEDULE, valid_rows(SCHEDULE, 3, uses_latent), uses_latent)
    assert torch.equal(table.trimmed().coefficients, table.coefficients)
    one = Schedule.explicit([0], 4)
    rows = torch.zeros(4, 3 + uses_latent)
    rows[1:, 0] = 2.0
    rows[1:, -1] += uses_latent
    short = Table(one, rows, uses_latent).trimmed()
    assert (short.history, short.uses_latent) == (1, uses_latent)
    ring, latent = torch.randn(3, 5), torch.randn(5) if uses_latent else None
    exact = Table(one, rows, uses_latent).apply(ring, 2, latent)
    assert torch.equal(short.apply(ring[:1], 2, latent), exact)


def split_table(split):
    return Table(SCHEDULE, torch.zeros(8, 1), split=split)


def test_parts_have_tables_of_their_own():
    rows = [valid_rows(SCHEDULE, 3), 2 * valid_rows(SCHEDULE, 3)]
    table = Table(SCHEDULE, valid_rows(SCHEDULE, 1), split=None)
    assert table.parts == 1 and table.part(0) is table
    rows[0][:, 2] = 0
    table = Table(SCHEDULE, 0 * rows[0], split=torch.stack(rows, -1))
    assert table.parts == 2 and table.trimmed().history == 3  # the second part reaches farther
    assert torch.equal(table.part(1).coefficients, rows[1].double())
    ring = torch.randn(3, 5)
    exact = Table(SCHEDULE, rows[0]).apply(ring, 5)
    assert torch.equal(table.part(0).apply(ring, 5), exact)


def broken(step, column, value):
    rows = valid_rows(SCHEDULE, 3)
    rows[step, column] = value
    return rows


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Table(SCHEDULE, torch.zeros(7, 2)), r"coefficients=\[7, 2\]: a wrong shape"),
        (lambda: Table(SCHEDULE, torch.zeros(8)), "shape"),
        (lambda: Table(SCHEDULE, torch.zeros(8, 1), uses_latent=True), r"\[8, K \+ 1\]"),
        (
            lambda: Table(SCHEDULE, torch.zeros(8, 1), bias=torch.zeros(7)),
            r"bias=\[7\]: a wrong",
        ),
        (lambda: Table(SCHEDULE, broken(5, 0, float("nan"))), r"coefficients\[5\]=nan: not finite"),
        (lambda: Table(SCHEDULE, broken(4, 0, 1.0)), "step=4: (it is )?full"),
        (lambda: Table(SCHEDULE, broken(3, 2, 1.0)), "step=3: it weighs column 2"),
        (lambda: Table(SCHEDULE, torch.zeros(8, 1), bias=torch.ones(8)), "step=0: it is full"),
        (lambda: split_table(torch.zeros(8, 2, 2)), r"beside coefficients \[8, 1\] it must be"),
        (lambda: split_table(torch.ones(8, 1, 2)), "step=0: it is full"),
        (lambda: Table(Schedule.every(3), torch.zeros(8, 1)), "bind"),
    ],
)
def test_a_table_that_cannot_run_is_refused(make, told):
    with pytest.raises(LesaError, match=told):
        make()


def test_autoregressive_tables_may_weigh_forecasts():
    rows = broken(3, 2, 1.0)
    assert Table(SCHEDULE, rows, autoregressive=True).available(3) == 3


def test_apply_refuses_what_it_cannot_do():
    features = [torch.ones(1)] * 3
    table = Table(SCHEDULE, valid_rows(SCHEDULE, 2, latent=True), uses_latent=True)
    with pytest.raises(LesaError, match="latent=None"):
        table.apply(features, 5)
    with pytest.raises(LesaError, match="step=4: (it is )?full"):
        table.apply(features, 4, features[0])
    with pytest.raises(LesaError, match="features=1"):
        table.apply(features[:1], 5, features[0])


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *(("schedule", value) for value in (None, [0, 1], "every(3)")),
        *(("coefficients", value) for value in (None, 1.0, [[0.0]], "rows")),
        ("coefficients", torch.tensor(1.0)),
        ("coefficients", torch.zeros(8)),
        ("coefficients", torch.zeros(8, 0)),
        ("coefficients", torch.zeros(8, 2, dtype=torch.complex64)),
        ("coefficients", torch.zeros(8, 2, dtype=torch.bool)),
        ("coefficients", torch.zeros(8, 2).to_sparse()),
        ("coefficients", torch.zeros(8, 2, device="meta")),
        *((name, v) for name in ("bias", "split") for v in (1.0, [0.0] * 8, "b")),
        ("bias", torch.tensor(0.0)),
        ("split", torch.zeros(8, 2, 0)),
        ("split", torch.tensor(0.0)),
        *((name, v) for name in ("uses_latent", "autoregressive") for v in (None, 1, "yes")),
        ("gated", "rows"),
    ],
    ids=str,
)
def test_every_wrong_field_is_one_sentence(field, wrong):
    fields = {"schedule": SCHEDULE, "coefficients": torch.zeros(8, 2)}
    with pytest.raises(LesaError, match=f"{field}=") as caught:
        Table(**{**fields, field: wrong})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", [8, -1, None, 2.5, "2", torch.ones(2)], ids=repr)
def test_a_step_past_the_end_is_refused(step):
    table = Table(SCHEDULE, valid_rows(SCHEDULE, 2))
    for call in (table.row, table.available, table.used, lambda s: table.apply([], s)):
        with pytest.raises(LesaError, match="step="):
            call(step)
    with pytest.raises(LesaError, match="index=1"):
        table.part(1)


def test_from_rows_refuses_what_makes_no_row():
    with pytest.raises(LesaError, match="history="):
        Table.from_rows(SCHEDULE, 0, lambda step, cached: [1.0])
    with pytest.raises(LesaError, match="row=3 weights"):
        Table.from_rows(SCHEDULE, 2, lambda step, cached: [1.0, 2.0, 3.0])
