"""Token-wise caches: all tokens is the plain run, none is reuse, and nothing of them stays."""

from __future__ import annotations

from contextlib import contextmanager
from math import ceil

import pytest
import torch
from tiny_pipelines import build as tiny

from lesa.core.schedule import Schedule
from lesa.errors import LesaError
from lesa.evaluation import Bench, build
from lesa.evaluation.methods import unfit
from lesa.evaluation.peers.tokenwise import ClusCa, DuCa, ToCa, tokenwise
from lesa.evaluation.peers.tokenwise.memory import Cell, Moment
from lesa.evaluation.peers.tokenwise.rules import kmeans
from lesa.evaluation.runs import step_flops

STEPS = 6
SCHEDULE = Schedule.explicit((0, 2), STEPS)
TEXT, IMAGE = 6, 64


@pytest.fixture(scope="module")
def flux():
    pipe, call = tiny("flux")
    return pipe, lambda: pipe(**call(2), return_dict=False)[0]


@pytest.fixture(scope="module")
def plain(flux):
    return flux[1]()


def cached(flux, rule, schedule=SCHEDULE):
    with tokenwise(flux[0], rule, schedule):
        return flux[1]()


@pytest.mark.parametrize("rule", [ToCa(ratio=5.0), ClusCa(clusters=IMAGE)])
def test_with_all_tokens_computed_it_is_the_plain_run(flux, plain, rule):
    torch.testing.assert_close(cached(flux, rule), plain)


@contextmanager
def reused_outputs(model, schedule):
    """What reuse of every sub-layer's output is, by hooks on the plain model's own layers."""
    calls: dict = {}

    def replace(module, args, output):
        history = calls.setdefault(module, [])
        step, branch = divmod(len(history), 2)  # two guidance branches take turns
        last = history[2 * (step - 1) + branch] if step else None
        history.append(output if schedule.is_full(step) else last)
        return history[-1]

    doubles, singles = model.transformer_blocks, model.single_transformer_blocks
    layers = [layer for block in doubles for layer in (block.attn, block.ff, block.ff_context)]
    hooks = [m.register_forward_hook(replace) for m in (*layers, *(b.proj_out for b in singles))]
    yield
    for hook in hooks:
        hook.remove()


def test_with_no_token_computed_it_reuses_the_outputs_of_sub_layers(flux, plain):
    with reused_outputs(flux[0].transformer, SCHEDULE):
        expected = flux[1]()
    torch.testing.assert_close(cached(flux, ToCa(ratio=0.0)), expected)
    assert (expected - plain).abs().max() > 1e-3


def test_the_pipeline_is_as_before(flux, plain):
    model = flux[0].transformer
    kind, config = type(model), model._internal_dict
    with pytest.raises(ZeroDivisionError), tokenwise(flux[0], ToCa(), SCHEDULE):
        flux[1]()
        raise ZeroDivisionError
    assert torch.equal(flux[1](), plain)
    assert (type(model), model._internal_dict) == (kind, config)
    assert not any("forward" in module.__dict__ for module in model.modules())


def tokens_of(flux, rule):
    """Tokens that the image MLP of the first block computes at each step, one branch."""
    seen = []
    layer = flux[0].transformer.transformer_blocks[0].ff
    hook = layer.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    cached(flux, rule)
    hook.remove()
    return seen[::2]


def test_how_many_tokens_run(flux):
    share = ceil(0.1 * 0.4 * 1.5 * IMAGE)
    assert tokens_of(flux, ToCa()) == [IMAGE, share, IMAGE, share, share, share]
    assert tokens_of(flux, DuCa()) == [IMAGE, share, IMAGE, share, 0, share]
    assert tokens_of(flux, ClusCa(clusters=5)) == [IMAGE, 5, IMAGE, 5, 5, 5]


def test_more_computed_tokens_are_more_operations(flux):
    pipe, call = flux[0], tiny("flux")[1]
    settings = call(1)
    del settings["generator"], settings["output_type"]
    settings["true_cfg_scale"] = 1.0

    def flops(rule):
        with tokenwise(pipe, rule, SCHEDULE):
            return step_flops(pipe, "", settings, STEPS)

    whole, few, alternating = step_flops(pipe, "", settings, STEPS), flops(ToCa()), flops(DuCa())
    none = flops(ToCa(ratio=0.0))
    same = [counted == plain for counted, plain in zip(alternating, whole, strict=True)]
    assert same == [SCHEDULE.is_full(step) for step in range(STEPS)]
    skipped = SCHEDULE.skipped_steps
    runs = [sum(run[step] for step in skipped) for run in (none, alternating, few, whole)]
    assert runs == sorted(set(runs))


def test_two_runs_and_two_batches_are_alike(flux):
    assert torch.equal(cached(flux, DuCa()), cached(flux, DuCa()))
    pipe, call = flux[0], tiny("flux")[1]
    for rule in (ToCa(), DuCa(), ClusCa(clusters=5)):
        with tokenwise(pipe, rule, SCHEDULE):
            both, one = (pipe(**call(n), return_dict=False)[0] for n in (2, 1))
        # Rounding differs with the batch, and a near tie may then choose another token
        assert (both[:1] - one).norm() < 5e-3 * one.norm()


def test_the_tokens_with_most_attention_come_first_and_then_the_oldest():
    cell = Cell(ToCa(ratio=1.0, age_weight=0.5), Moment(interval=2), depth=1.0, single=False)
    cell.pick("image", torch.zeros(1, 10, 1))
    cell.received = {"image": torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])}
    cell.moment.since = 1
    first = cell.pick("image", torch.zeros(1, 10, 1))  # 0.4 * (1.5 - 1) of 10 tokens
    assert first.tolist() == [[0, 1]]
    assert cell.ages["image"].tolist() == [[0, 0, *[1] * 8]]
    assert cell.pick("image", torch.zeros(1, 10, 1)).tolist() == [[2, 3]]


def test_clusca_forecasts_linearly_and_passes_computed_tokens_on():
    rule = ClusCa(clusters=2, spread=0.25)
    moment = Moment(interval=2, clusters={"image": (torch.tensor([[0, 2]]), None)})
    moment.clusters["image"] = (torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1, 1]]))
    cell = Cell(rule, moment, depth=0.0, single=False)
    start, slope = torch.randn(2, 1, 4, 3, dtype=torch.float64).unbind()
    for moment.step in (0, 2):
        cell.settle("site", "image", start + moment.step * slope, None)
    moment.step, moment.since = 5, 3
    own, fresh = start + 5 * slope, torch.randn(1, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(cell.forecast("site"), own)
    found = cell.settle("site", "image", fresh, moment.clusters["image"][0])
    torch.testing.assert_close(found[:, [0, 2]], fresh)
    torch.testing.assert_close(found[:, [1, 3]], 0.75 * own[:, [1, 3]] + 0.25 * fresh)


def test_clusters_of_separate_groups_are_the_groups():
    group = torch.tensor([[0, 1, 2, 0, 1, 2, 2, 1], [2, 1, 0, 0, 0, 1, 2, 2]])
    tokens = 100.0 * group[..., None] + torch.randn(2, 8, 5)
    index, member = kmeans(tokens, 3)
    assert torch.equal(group.gather(1, index).gather(1, member), group)
    assert all(len(set(row)) == 3 for row in index.tolist())


def test_built_at_every_nth_step_or_on_a_list(flux):
    bench = Bench(50, flux[0])
    for name in ("toca", "duca", "clusca"):
        assert build(name, 10, bench).schedule.full_steps == tuple(range(0, 50, 5))
    listed = build("duca", 2, Bench(STEPS, flux[0]), searched=SCHEDULE)
    assert listed.label == "duca (searched steps) @2" and "12 %" in listed.note


def test_where_it_cannot_run(flux):
    assert "not QwenImageTransformer2DModel" in unfit("toca", Bench(STEPS, tiny("qwen")[0]))
    assert unfit("clusca", Bench(STEPS)) is not None
    call = tiny("flux")[1](1, joint_attention_kwargs={"ip_adapter": 1})
    with tokenwise(flux[0], ToCa(), SCHEDULE), pytest.raises(LesaError, match="ip_adapter"):
        flux[0](**call)
