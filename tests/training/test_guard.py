"""The search for a guard: what it chooses, what it costs, and what it refuses to believe."""

from __future__ import annotations

import processes
import pytest
import torch
from training_jobs import STEPS, make_job

import lesa
from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.training import guard as guards
from lesa.training.budget import EXTRA, Budget
from lesa.training.guard import choose, with_extra
from lesa.training.objective import objective
from lesa.util.progress import Progress
from lesa.util.ranks import joined


def test_a_signal_that_holds_is_found():
    """The three pictures with the largest risk are bad, and good with the other list."""
    risk = torch.linspace(0.1, 0.9, 16, dtype=torch.float64)
    risk[-3:] += 1
    scores = torch.full((16,), 50.0, dtype=torch.float64)
    scores[-3:] = 30.0
    others = torch.full((16,), 45.0, dtype=torch.float64)
    limit, gain = choose(risk, scores, others, 0.5)
    assert risk[-4] < limit < risk[-3]
    best = scores.clone()
    best[-3:] = 45.0
    assert 4 < gain < objective(best) - objective(scores)  # chance helps some of them too


def test_of_a_signal_that_is_chance_nothing_is_believed():
    """On the pictures that the limit was chosen on it always gains; on others it does not, even
    where the other list is better for every picture."""
    draw = torch.Generator().manual_seed(0)
    believed, hoped = [], []
    for turn in range(200):
        risk, scores, others = torch.rand(3, 16, generator=draw).double()
        scores, others = 40 + 10 * scores, 40 + 5 * (turn % 2) + 10 * others
        limit, gain = choose(risk, scores, others, 0.5)
        believed.append(gain)
        mixed = scores if limit is None else torch.where(risk > limit, others, scores)
        hoped.append(objective(mixed) - objective(scores))
    assert min(hoped) >= 0 and sum(hoped) / 200 > 0.4
    assert -1 < sum(believed) / 200 < 0


def test_no_more_than_a_share_is_at_risk():
    risk = torch.arange(16, dtype=torch.float64)
    limit, _ = choose(risk, torch.zeros(16).double(), torch.ones(16).double(), 0.25)
    assert (risk > limit).sum() == 4


def test_equal_risks_are_on_one_side():
    risk = torch.ones(16, dtype=torch.float64)
    limit, gain = choose(risk, torch.zeros(16).double(), torch.ones(16).double(), 0.5)
    assert limit is None and gain == 0


def test_a_limit_is_a_finite_number():
    """A feature of zeros changes without bound; no file takes such a limit."""
    risk = torch.tensor([float("inf"), 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]).double()
    others = torch.tensor([9.0, -50, 0, 0, 0, 0, 0, 0]).double()
    assert choose(risk, torch.zeros(8).double(), others, 0.5)[0] is None
    others[1] = 9.0
    assert choose(risk, torch.zeros(8).double(), others, 0.5)[0] == 2.5


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [
        ((0, 2, 6, 11), 20, (0, 2, 4, 6, 8, 11)),
        ((0, 1, 2, 3), 6, (0, 1, 2, 3, 4)),
        ((0, 1), 2, None),
    ],
)
def test_more_full_steps_fill_the_gaps_behind_the_second(steps, count, expected):
    found = with_extra(Schedule.explicit(steps, count))
    assert expected == (None if found is None else found.full_steps)


class Watched(Progress):
    """Keeps every bar."""

    def __init__(self):
        super().__init__(quiet=True)
        self.bars = []

    def bar(self, *about):
        watched = super().bar(*about)
        self.bars.append(about[0])
        return watched


def train(name, kind, **more):
    job, shown = make_job(name, prompts=8), Watched()
    made = lesa.train(
        job.pipe, job.prompts, STEPS, 3, call=job.call, guard=kind, progress=shown, **more
    )
    return job, made, shown


@pytest.mark.parametrize("kind", ["route", "spend"])
@pytest.mark.parametrize(
    ("name", "tap"),
    [("flux", "output"), ("flux", "hidden"), ("sdxl", "output"), ("sdxl", "hidden")],
)
def test_what_training_finds_is_what_runs(monkeypatch, name, tap, kind):
    """Whatever it gains: random weights have no signal."""
    monkeypatch.setattr(guards, "GAIN", -float("inf"))
    monkeypatch.setattr(
        guards, "choose", lambda risk, *_: (float(risk.sort().values[-2:].mean()), 1)
    )
    job, made, shown = train(name, kind, tap=tap)
    (entry,) = made.calibrations
    assert entry.guard is not None and entry.guard.kind == kind
    assert entry.guard.share == 1 / 8 and entry.worth is not None
    told = next(line for line in shown.lines if line.startswith(f"guard: {kind}, "))
    steps = entry.guard.extra_steps(entry.schedule) or entry.guard.schedule.full_steps
    assert f"full steps ({', '.join(map(str, steps))}) for" in told and "1 of 8 pictures" in told
    risks = []
    with lesa.accelerate(job.pipe, made):
        for prompt in range(8):
            job.run([prompt], STEPS)
            risks.append(lesa.stats(job.pipe).risk)
        found = lesa.stats(job.pipe)
    assert found.fallbacks == {} and found.guarded == 1
    assert sorted(risks)[-2] < entry.guard.limit < max(risks)


def test_without_a_signal_there_is_none():
    _, made, shown = train("flux", "spend")
    (entry,) = made.calibrations
    assert entry.guard is None
    (told,) = [line for line in shown.lines if line.startswith("guard='spend': none, since it ")]
    assert told.endswith(
        "on pictures that its limit was not chosen on, and 0.2 is the least that counts"
    )


@pytest.mark.parametrize(
    ("kind", "why"),
    [("route", "no other list begins with"), ("spend", "no step is skipped behind the second")],
)
def test_where_there_is_nothing_to_try_it_says_so(kind, why):
    given = Schedule.explicit((0, 2), 3)
    job, shown = make_job("flux", prompts=8), Watched()
    lesa.train(job.pipe, job.prompts, 3, schedule=given, call=job.call, guard=kind, progress=shown)
    assert any(line.startswith(f"guard={kind!r}: none, since {why}") for line in shown.lines)


@pytest.mark.parametrize("kind", ["route", "spend"])
def test_a_budget_pays_for_it(kind):
    _, _, shown = train("flux", kind, budget=24)
    (cost,) = [line for line in shown.lines if line.startswith("cost: ")]
    assert float(cost.split(", ")[1].split()[0]) <= 24


def test_the_least_that_is_possible_includes_it():
    without, within = Budget(10.0), Budget(10.0, guard=True)
    without.check(5, 5, [3], 20)
    with pytest.raises(LesaError, match="three with a guard, .* give 15.3 or more$"):
        Budget(12.0, guard=True).check(9, 9, [3], 20)  # 8 prompts need 13.6
    with pytest.raises(LesaError, match="give 15.3 or more, or at most 8 prompts$"):
        Budget(14.0, guard=True).check(9, 9, [3], 20)
    assert within.guarding(3, 20) == (2 * 3 + EXTRA) / 20 and without.guarding(3, 20) == 0
    assert within.per_prompt(3, 1, 20, 5) == pytest.approx(
        without.per_prompt(3, 1, 20, 5) - within.guarding(3, 20)
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"guard": "on"}, "guard='on': unknown; give one of 'off', 'route', 'spend'"),
        ({"guard": 1}, "guard=1: unknown"),
        ({"guard": False}, "guard=False: unknown"),
        ({"guard": "route", "form": "paper"}, "guard='route': form='paper' has none"),
        ({"guard": "spend"}, "guard='spend': 4 prompts do not tell which pictures are at risk"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(more, sentence):
    job = make_job("flux", prompts=4)
    ran = []
    hook = job.models[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(LesaError, match=sentence):
        lesa.train(job.pipe, job.prompts, STEPS, 3, call=job.call, progress=False, **more)
    hook.remove()
    assert not ran


@processes.needs_fork
@pytest.mark.parametrize("kind", ["route", "spend"])
def test_two_ranks_find_the_guard_of_one(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(guards, "GAIN", -float("inf"))
    monkeypatch.setattr(
        guards, "choose", lambda risk, *_: (float(risk.sort().values[-2:].mean()), 1)
    )
    job = make_job("flux", prompts=8)
    options = dict(call=job.call, form="table", guard=kind, batch_size=2, progress=False)

    def work(rank):
        torch.set_num_threads(1)
        with joined() as ranks:
            made = lesa.train(job.pipe, job.prompts, STEPS, 3, group=ranks.group, **options)
            made.save_pretrained(tmp_path / str(rank))

    ended = processes.launch(2, work, tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    alone = lesa.train(job.pipe, job.prompts, STEPS, 3, **options).calibrations[0]
    for rank in range(2):
        (entry,) = lesa.LesaForecaster.from_pretrained(tmp_path / str(rank)).calibrations
        assert entry.guard.kind == kind and entry.guard.schedule == alone.guard.schedule
        assert entry.guard.limit == pytest.approx(alone.guard.limit, rel=1e-6)
        assert entry.guard.share == alone.guard.share == 1 / 8
        assert entry.worth.mean == pytest.approx(alone.worth.mean, abs=1e-3)
        for branch, rows in alone.guard.rows.items():
            torch.testing.assert_close(entry.guard.rows[branch], rows, rtol=1e-5, atol=1e-6)
