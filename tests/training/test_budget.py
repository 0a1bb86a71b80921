"""What training may cost: plans, the least that is possible, and what was spent in the end."""

from __future__ import annotations

import pytest
from training_jobs import STEPS, make

import lesa
from lesa.errors import LesaError
from lesa.training.budget import Budget, quarter
from lesa.training.job import Job
from lesa.util.progress import Progress


@pytest.mark.parametrize(
    ("given", "generations", "seconds"),
    [
        (None, None, None),
        (40, 40, None),
        ("40", 40, None),
        ("90s", None, 90),
        ("20min", None, 1200),
        (" 1.5 h ", None, 5400),
    ],
)
def test_budgets_are_generations_or_times(given, generations, seconds):
    assert Budget.parse(given) == Budget(generations, seconds)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("soon", "budget='soon': neither a number of plain generations nor a time"),
        ("20 minutes", "budget='20 minutes': neither a number"),
        ("-3min", "budget='-3min': neither a number"),
        (0, "budget=0: nothing can be trained for that"),
        ("0s", "budget='0s': nothing can be trained for that"),
        (float("nan"), "budget=nan"),
        ([1], r"budget=\[1\]"),
        (True, "budget=True"),
    ],
)
def test_what_is_no_budget_is_told(given, sentence):
    with pytest.raises(LesaError, match=sentence):
        Budget.parse(given)


@pytest.mark.parametrize("prompts", [1, 4, 8, 10, 11, 12, 16, 50])
def test_by_default_a_prompt_costs_at_most_four_generations_for_one_count_and_ten_for_four(prompts):
    for steps in range(2, 60):
        for full in range(1, steps):
            one = 1 + Budget().per_prompt(full, 1, steps, prompts)
            four = 1 + 4 * Budget().per_prompt(full, 4, steps, prompts)
            assert one <= 4
            assert four <= 10
            if prompts <= 10:
                assert (one, four) == (4, 10)
            elif full <= 0.3 * steps:
                assert prompts * one == pytest.approx(max(40, 2.5 * prompts))
                assert prompts * four == pytest.approx(max(100, 7 * prompts))


def test_a_budget_that_pays_for_less_than_one_fit_says_what_is_possible():
    with pytest.raises(LesaError, match=r"budget=10: 16 prompts need 20.0 .* at most 8 prompts"):
        Budget(generations=10).check(16, 4, [10], 50)
    with pytest.raises(LesaError, match=r"give 2.8 or more$"):
        Budget(generations=1).check(2, 2, [1], 5)
    Budget(generations=20).check(16, 4, [10], 50)
    for count in range(1, 30):  # what it offers is enough, and the most
        judges = quarter(count) or count
        try:
            Budget(generations=9).check(count, judges, [10], 20)
            most = count
        except LesaError as error:
            assert f"at most {most} prompts" in str(error)
    assert most == 4
    with pytest.raises(LesaError, match=r"generation takes 5.0 s, so that 16 prompts need 1:40"):
        Budget(seconds=60).known(5.0, 16, 4, [10], 50)
    assert Budget(seconds=600).known(5.0, 16, 4, [10], 50) == Budget(generations=120)


def test_a_budget_too_small_is_told_before_the_pipeline_runs(monkeypatch):
    pipe, call = make("flux", prompts=8)
    monkeypatch.setattr(Job, "run", None)
    with pytest.raises(LesaError, match="budget=8: 8 prompts need 13.0 plain generations"):
        lesa.train(pipe, None, STEPS, 3, call=call, budget=8, progress=False)


@pytest.mark.parametrize("budget", [13, 14, 20, 40])
def test_training_keeps_to_its_budget_and_uses_it(budget):
    pipe, call = make("qwen", prompts=8)
    told = Progress(quiet=True)
    lesa.train(pipe, None, STEPS, 3, call=call, form="table", budget=budget, progress=told)
    spent = float(told.lines[-1].rsplit(" in all")[0].rsplit(", ")[1])
    assert 0.5 * budget < spent <= budget
    estimate = next(line for line in told.lines if line.startswith("estimate: "))
    assert f"for {budget} plain generations of" in estimate


def test_a_time_is_a_budget():
    pipe, call = make("qwen", prompts=8)
    told = Progress(quiet=True)
    with pytest.raises(LesaError, match=r"budget=0.001s: a plain generation takes"):
        lesa.train(pipe, None, STEPS, 3, call=call, budget="0.001s", progress=told)
    lesa.train(pipe, None, STEPS, 3, call=call, form="table", budget="1h", progress=told)
    assert any(line.startswith("estimate: ") for line in told.lines)


@pytest.mark.parametrize("form", ["disca", "paper"])
def test_a_form_that_keeps_to_no_budget_refuses_one(form, monkeypatch):
    pipe, call = make("flux", prompts=8)
    monkeypatch.setattr(Job, "run", None)
    with pytest.raises(LesaError, match=f"budget=30: the training of form='{form}' has a fixed"):
        lesa.train(pipe, None, STEPS, 3, call=call, form=form, budget=30, progress=False)
