"""Runs of the page: what they cost, that they are true, and that visitors do not mix."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

import lesa
from lesa import testbed
from lesa.errors import LesaError
from lesa.hooks.timed_run import generate
from lesa.play.counts import Counts, counts_of
from lesa.play.player import Made, Player, _Kept

TEXT, STEPS = "a large red circle on a white background", 6


def picture(pipe, seed: int) -> torch.Tensor:
    """What a user's own call makes."""
    settings = testbed.settings() | {"num_inference_steps": STEPS}
    return generate(pipe, [TEXT], [seed], settings).images[0]


def test_another_count_costs_an_accelerated_run_alone(player, played_pipe):
    plain = player.plain(TEXT, 1)
    few, more = player.accelerated(TEXT, 1, 2), player.accelerated(TEXT, 1, 3)
    assert player.plain(TEXT, 1) is plain is player.kept(TEXT, 1)
    assert player.accelerated(TEXT, 1, 2) is few
    stats = lesa.stats(played_pipe)
    assert (stats.off, stats.full, stats.skipped) == (STEPS, 2 + 3, 4 + 3)
    assert [len(made.full_steps) for made in (plain, few, more)] == [STEPS, 2, 3]
    assert player.kept(TEXT, 2) is None


def test_pictures_are_those_of_the_library(player, played_pipe):
    plain, fast = player.plain(TEXT, 3), player.accelerated(TEXT, 3, 2)
    lesa.disable(played_pipe)
    assert torch.equal(plain.picture, picture(played_pipe, 3))
    lesa.enable(played_pipe, lesa.Prior(), full_steps=2)
    assert torch.equal(fast.picture, picture(played_pipe, 3))
    assert fast.full_steps == lesa.stats(played_pipe).full_steps and not fast.notes


def test_a_trained_forecaster_runs_each_of_its_lists(played_pipe):
    """And no other count, for which it would spread full steps anew."""
    lists = {2: (0, 3), 3: (0, 2, 4)}
    picture(played_pipe, 0)  # sets the noise levels of so many steps
    forecaster, levels = lesa.LesaForecaster(), played_pipe.scheduler.sigmas.tolist()
    for full in lists.values():
        forecaster.recommend(lesa.Schedule.explicit(full, STEPS), levels)
    settings = testbed.settings() | {"num_inference_steps": STEPS}
    player = Player(played_pipe, forecaster, settings, counts_of(forecaster, STEPS))
    found = {count: player.accelerated(TEXT, 0, count).full_steps for count in lists}
    lesa.disable(played_pipe)
    assert found == lists
    with pytest.raises(LesaError, match="full steps=4: .* give 2 or 3"):
        player.accelerated(TEXT, 0, 4)


def test_two_visitors_at_once_get_what_each_would_get_alone(player):
    asked = [(1, 2), (2, 3), (1, 3), (2, None)]
    alone = [player._run(TEXT, seed, count).picture for seed, count in asked]
    gate = threading.Barrier(len(asked))

    def visit(seed: int, count: int | None) -> torch.Tensor:
        gate.wait()
        made = player.plain(TEXT, seed) if count is None else player.accelerated(TEXT, seed, count)
        return made.picture

    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(visit, *zip(*asked, strict=True)))
    assert all(map(torch.equal, alone, together))
    assert len({made.numpy().tobytes() for made in together}) == len(asked)


@pytest.mark.parametrize(
    ("prompt", "seed", "sentence"),
    [
        ("", 0, "prompt='': it is empty"),
        (" \n", 0, "prompt='': it is empty"),
        (None, 0, "prompt='': it is empty"),
        ("\ud800", 0, "no valid Unicode"),
        (TEXT, -1, "seed=-1: not a whole number"),
        (TEXT, 0.5, "seed=0.5: not a whole number"),
        (TEXT, None, "seed=None: not a whole number"),
        (TEXT, 2**63, "seed=.*: above"),
    ],
)
def test_what_a_visitor_types_is_checked(player, prompt, seed, sentence):
    with pytest.raises(LesaError, match=sentence):
        player.checked(prompt, seed)


def test_blanks_around_a_prompt_do_not_make_another_run(player):
    assert player.checked(f" {TEXT}\n", 7) == (TEXT, 7)


def test_a_forecaster_of_another_model_leaves_the_pipeline_as_it_was(played_pipe):
    other = lesa.LesaForecaster(metadata={"model_class": "QwenImageTransformer2DModel"})
    with pytest.raises(LesaError, match="trained for model_class='QwenImage"):
        Player(played_pipe, other, testbed.settings(), Counts(50))
    with pytest.raises(LesaError):
        lesa.stats(played_pipe)


def test_a_closed_page_waits_for_no_run(player, played_pipe):
    """A run ends at its next step, and the pipeline serves others as before."""
    steps = []

    class Closing(threading.Event):
        def is_set(self) -> bool:
            steps.append(1)
            if len(steps) == 2:
                player.close()
            return super().is_set()

    player._closed = Closing()
    with pytest.raises(LesaError, match="its page was closed"):
        player.plain(TEXT, 0)
    assert len(steps) == 2 and "progress_bar" not in vars(played_pipe)
    with pytest.raises(LesaError, match="its page was closed"):
        player.accelerated(TEXT, 0, 2)
    assert len(steps) == 3 and picture(played_pipe, 0).isfinite().all()


def test_what_ran_in_full_besides_is_told(player, played_pipe, monkeypatch):
    before = SimpleNamespace(fallbacks={"another size": 1})
    after = SimpleNamespace(
        fallbacks={"another size": 1, "gradients are on": 4}, full_steps=(0, 3), num_steps=STEPS
    )
    answers = iter([before, after])
    monkeypatch.setattr(lesa, "stats", lambda pipe: next(answers))
    made = player._run(TEXT, 0, 2)
    assert made.notes == ("4 more in full: gradients are on",)


def test_the_oldest_pictures_are_forgotten_but_never_the_last_two():
    def made() -> Made:
        return Made(torch.zeros(3, 4, 4), 1.0, (0,), 1)  # 192 bytes

    kept = _Kept(3 * 192)
    for key in "abc":
        kept.put(key, made())
    assert kept.get("a")  # is new again
    kept.put("d", made())
    assert [key for key in "abcd" if kept.get(key)] == ["a", "c", "d"]
    none = _Kept(0)
    for key in "abc":
        none.put(key, made())
    assert [key for key in "abc" if none.get(key)] == ["b", "c"]
