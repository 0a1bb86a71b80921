"""`lesa.train` sorts and checks its arguments before the pipeline runs."""

from __future__ import annotations

import copy
import functools
import re

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import build
from training_jobs import STEPS, make

import lesa
from lesa.errors import LesaError
from lesa.training.arguments import sorted_arguments
from lesa.training.calibration_prompts import checked_prompts, held_out
from lesa.training.numbers import checked_target, counts_of
from lesa.util.progress import Progress


@pytest.fixture(scope="module")
def idle():
    """A pipeline that fails the test when it is called, with the arguments of a real one."""
    pipe = copy.copy(make("sdxl")[0])

    @functools.wraps(type(pipe).__call__)
    def called(self, *args, **kwargs):
        pytest.fail("the pipeline has run before the arguments were checked")

    pipe.__class__ = type("IdlePipeline", (type(pipe),), {"__call__": called})
    return pipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(hihgt=64), r"^hihgt=64: neither .* IdlePipeline nor .*; did you mean height\?$"),
        (dict(xyz=1), r"^xyz=1: neither .*; drop or correct it$"),
        (dict(xyz=torch.zeros(2, 3)), r"^xyz=a tensor \[2, 3\]: neither "),
        (dict(call={"hihgt": 64}), r"^hihgt=64: no argument of the pipeline, .* mean height\?$"),
        (dict(call={"stages": (0.5,)}), r"^stages=\(0.5,\): .*call=; pass it in settings=$"),
        (dict(settings={"height": 64}), r"^height=64: .*settings=; pass it in call=$"),
        (dict(settings={"histroy": 2}), r"^histroy=2: .*; did you mean history\?$"),
        (dict(settings={"tap": "hidden"}), r"^tap='hidden': .*; pass tap= to lesa.train itself$"),
        (dict(settings={"history": 0}), "^history=0: not a whole number"),
        (dict(settings={"stages": 0.5}), "^stages=0.5: not a list"),
        (dict(history=0), "^history=0: not a whole number"),
        (dict(form="papre"), "^form='papre': not one of"),
        (dict(tap="middle"), "^tap='middle': not one of"),
        (dict(batch_size=0), "^batch_size=0: not a whole number >= 1"),
        (dict(refine=-1), "^refine=-1: not a whole number >= 0"),
        (dict(polish=0.5), "^polish=0.5: not a whole number >= 0"),
        (dict(call={"generator": torch.Generator()}), "^generator=.*: training makes a noise"),
        (dict(full_steps=7), "^full_steps=7 is more than num_inference_steps=6"),
        (dict(settings={"branches": ["x"]}), "^branches=.*; leave it out, the pipeline's own runs"),
        (dict(call={1: 2}), "^call=.*: 1 is no name; give texts"),
        (dict(call={"prompt": "a"}), "^prompt=.*: it stands in call=; pass prompts to lesa.train"),
        (dict(validation=torch.tensor(2.5)), "^validation=tensor.*: not a whole number"),
        (
            dict(full_steps=6),
            "^full_steps=6 are all of num_inference_steps=6, so .*; ask for fewer",
        ),
        (dict(prompts=[""]), r"^prompts=\[''\]: not a list of non-empty strings; pass 8"),
        (dict(prompts=(x for x in ["a", 3])), r"^prompts=\['a', 3\]: not a list of non-empty"),
        (dict(prompts=3), "^prompts=3: not a list of non-empty strings; pass 8"),
        (dict(prompts="a circle"), "^prompts='a circle': not a list of non-empty strings"),
        (dict(seed=1.5), "^seed=1.5: not a whole number >= 0"),
        (dict(seed=-1), "^seed=-1: not a whole number >= 0"),
        (dict(seed=2**63), "^seed=.*: above 9223372036854775807; use"),
        (dict(call=3), "^call=3: not a dict; give arguments by their names"),
        (dict(settings=[1]), r"^settings=\[1\]: not a dict; give arguments by their names"),
        (dict(height="64"), "^height='64': not a whole number >= 1"),
        (dict(call={"width": 64.5}), "^width=64.5: not a whole number >= 1"),
        (dict(num_images_per_prompt=0), "^num_images_per_prompt=0: not a whole number >= 1"),
        (dict(guidance_scale="high"), "^guidance_scale='high': not a finite number; give a"),
        (dict(output_type="pil"), "^output_type='pil': training needs 'latent'; leave it out"),
        (dict(return_dict=True), "^return_dict=True: training needs False; leave it out"),
        (dict(schedule=5), "^schedule=5: not a Schedule; give one such as"),
        *(
            (dict(full_steps=wrong), "^full_steps=.*: (not a whole number|no number)")
            for wrong in (None, True, 2.0, "3", [], [3, None], torch.ones(2), {"a": 3})
        ),
        (dict(num_inference_steps=10**30), "^num_inference_steps=10.*: above 100000"),
        (
            dict(form="paper", full_steps=(3, 2)),
            r"^full_steps=\[3, 2\]: form='paper' is tied",
        ),
        (dict(form="paper", num_inference_steps=(6, 8)), r"^num_inference_steps=\[6, 8\]: form="),
    ],
)
def test_a_wrong_argument_is_told_before_any_work(idle, options, message):
    given = {"prompts": ["a"], "num_inference_steps": STEPS, "full_steps": 3, **options}
    with pytest.raises(LesaError, match=message) as told:
        lesa.train(idle, progress=False, **given)
    assert "\n" not in str(told.value)


def test_a_list_says_how_many_full_steps_there_are(idle):
    """`full_steps`, 10 where nothing is said, is not asked of a shorter run then."""
    schedule = lesa.Schedule.every(3)
    assert counts_of(schedule, [STEPS, 12]) == [len(schedule.bind(STEPS).full_steps)]
    with pytest.raises(pytest.fail.Exception, match="the pipeline has run"):
        lesa.train(idle, ["a"], STEPS, schedule=schedule, progress=False)


def test_prompts_may_be_anything_that_gives_texts():
    assert checked_prompts((text for text in ("a", "b")), {}) == ["a", "b"]


def test_a_number_may_be_numpys(idle):
    call = {"height": np.int64(64), "guidance_scale": 2, "output_type": "latent"}
    call |= {"original_size": (64, 64), "width": None}  # a pair of numbers is no number
    assert sorted_arguments(idle, call, None, {})[0] == call


def test_call_settings_and_more_are_sorted_by_name(idle):
    call = {"height": 64, "guidance_scale": 2.0, "num_inference_steps": 50}
    taken, fields = sorted_arguments(
        idle, call, {"history": 2}, {"guidance_scale": 3.0, "stages": (0.5,)}
    )
    assert taken == {"height": 64, "guidance_scale": 3.0}
    assert fields == {"history": 2, "stages": (0.5,)}


def test_settings_and_more_train_the_same_forecaster():
    pipe, call = make("sdxl")
    told = Progress(quiet=True)
    options = dict(form="table", refine=0, polish=0, call=call, progress=told)
    one = lesa.train(pipe, None, STEPS, 3, settings={"history": 2}, **options)
    other = lesa.train(pipe, None, STEPS, 3, history=2, **options)
    (first,), (second,) = one.calibrations, other.calibrations
    assert one.settings == other.settings and one.settings.history == 2
    assert first.schedule == second.schedule
    full = ", ".join(map(str, first.schedule.full_steps))
    sentence = rf"fitted: 3 of {STEPS} steps in full \({full}\): 2 pictures [\d.]+ dB"
    assert any(re.match(sentence + r" mean, [\d.]+ dB minimum", line) for line in told.lines)
    assert all(torch.equal(rows, second.rows[name]) for name, rows in first.rows.items())


def test_a_quarter_of_enough_prompts_is_held_out():
    texts = [f"prompt {i}" for i in range(17)]
    assert held_out(None, texts, {}) == (texts, {3, 7, 11, 15})
    with pytest.warns(UserWarning, match="7 prompts are too few to hold some out"):
        assert held_out(None, texts[:7], {}) == (texts[:7], frozenset())


def test_prompts_to_validate_on_come_behind_or_are_held_out_by_number():
    texts = [f"prompt {i}" for i in range(6)]
    assert held_out(["x", "y"], texts, {}) == ([*texts, "x", "y"], {6, 7})
    assert held_out(2, texts, {}) == (texts, {2, 5})
    assert held_out(0, texts, {}) == (texts, frozenset())  # and no warning
    for count in range(1, 5):
        assert len(held_out(count, texts, {})[1]) == count


@pytest.mark.parametrize(
    ("validation", "call", "sentence"),
    [
        (5, {}, "validation=5: of 6 prompts 1 would be left to fit; hold out at most 4"),
        (9, {}, "validation=9: of 6 prompts 0 would be left"),
        (-1, {}, "validation=-1"),
        (True, {}, "validation=True"),
        ("a prompt", {}, "validation='a prompt': not a list of non-empty strings"),
        (["a", ""], {}, "validation=.*not a list of non-empty strings"),
        (["a", "prompt 2"], {}, "validation=.*: 1 of its prompts are fitted too"),
        (["a"], {"prompt_embeds": 1}, "prompts are given as embeddings"),
    ],
)
def test_what_cannot_be_held_out_is_told(validation, call, sentence):
    with pytest.raises(LesaError, match=sentence):
        held_out(validation, [f"prompt {i}" for i in range(6)], call)


@pytest.mark.parametrize(
    ("target", "more", "sentence"),
    [
        (0, {}, "target_psnr=0: no dB"),
        (400, {}, "target_psnr=400: no dB that a forecast reaches; give 20 to 100"),
        ("x", {}, "target_psnr='x'"),
        (40, {"form": "paper"}, "form='paper' calibrates one number of full steps"),
        (40, {"schedule": lesa.Schedule.every(3)}, "schedule=... calibrates one number"),
        (40, {"full_steps": [10, 8]}, "give one number, or leave target_psnr out"),
    ],
)
def test_targets_that_cannot_be_are_told(target, more, sentence):
    counts = more.get("full_steps", [10])
    with pytest.raises(LesaError, match=sentence):
        checked_target(target, more.get("form", "table"), more.get("schedule"), counts)


@pytest.mark.parametrize("pipe", [5, None, diffusers.FluxPipeline, torch.nn.Linear(1, 1)], ids=str)
def test_what_is_no_pipeline_is_told(pipe):
    with pytest.raises(LesaError, match="^pipe=.*: not a diffusers pipeline with a scheduler"):
        lesa.train(pipe, ["a"], guidance_scale=3.5)


def test_a_pipeline_without_prompts_is_told():
    pipe, _ = build("dit")
    with pytest.raises(LesaError, match="^prompts=.*: DiTPipeline takes none; pass prompts=None"):
        lesa.train(pipe, ["a"], 6, 2)


def test_a_number_of_steps_that_is_not_used_is_told(idle):
    with pytest.warns(UserWarning, match=r"num_inference_steps=5: .*not used, since \[6\] is"):
        sorted_arguments(idle, {"num_inference_steps": 5}, None, {}, [6])
    with pytest.raises(LesaError, match="^sigmas=.*: 2 values for num_inference_steps="):
        sorted_arguments(make("flux")[0], {"sigmas": [1.0, 0.5]}, None, {}, [6])
