"""FreqCa, TeaCache and SpeCa against their formulas, on tiny real pipelines."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import lesa
from lesa.core.schedule import Schedule
from lesa.evaluation.method import Bench, Use
from lesa.evaluation.peers import thresholds
from lesa.evaluation.peers.adaptive import ADAPTIVE
from lesa.evaluation.peers.freqca import dct_matrix, freqca, low_band, project
from lesa.evaluation.peers.layouts import first_block, known_layout, last_block
from lesa.evaluation.peers.speca import SpeCa, mean_error, speca
from lesa.evaluation.peers.teacache import fit_polynomial, polynomial_for, teacache
from lesa.evaluation.peers.thresholds import threshold_for
from lesa.evaluation.runs import step_flops
from lesa.forecasters import HiCache, Taylor
from lesa.hooks.model_specs import model_spec
from lesa.hooks.wrappers import core_of
from tests.tiny_pipelines import build, run

PIPELINES = ("flux", "qwen", "hunyuan-video")
STEPS = 8


@pytest.fixture(scope="module", params=PIPELINES)
def case(request):
    """A pipeline, its call of 8 steps, and the plain result."""
    pipe, call = build(request.param)

    def arguments():
        return call(num_inference_steps=STEPS)

    return SimpleNamespace(
        name=request.param, pipe=pipe, call=arguments, plain=run(pipe, arguments())
    )


class Passes:
    """Watches a model: per pass its branch, embedded tokens, what the tail got, and fullness."""

    def __init__(self, pipe):
        self.core = core_of(pipe.transformer)
        self.spec = model_spec(self.core)
        self.seen = []
        self._embedder = getattr(self.core, "x_embedder", None) or self.core.img_in

    def __enter__(self):
        tail = self.spec.module(self.core, self.spec.tail)
        self.handles = [
            self._embedder.register_forward_hook(self._embedded),
            last_block(self.core, self.spec).register_forward_hook(self._ran),
            tail.register_forward_pre_hook(self._tail),  # behind the one that puts features there
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _embedded(self, module, args, output):
        self.seen.append(SimpleNamespace(tokens=output.clone(), full=False))

    def _ran(self, *_):
        self.seen[-1].full = True

    def _tail(self, module, args):
        self.seen[-1].feature = args[0].clone()


def applied(case, manager):
    """Result, passes and Use of one generation under a cache; none of it may stay behind."""
    with manager(case.pipe) as use, Passes(case.pipe) as passes:
        result = run(case.pipe, case.call())
    assert torch.equal(run(case.pipe, case.call()), case.plain)
    return result, passes.seen, use


def full_steps(seen, branches):
    """Steps at which each branch, in turn, ran the whole model; a verification counts for none."""
    return len([one for one in seen if one.full]) / branches


def test_the_dct_is_that_of_the_mirrored_fourier_transform():
    signal = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spectrum = torch.fft.fft(torch.cat([signal, signal.flip(0)]))[:9]
    turn = torch.exp(-1j * math.pi * torch.arange(9) / 18)
    scale = torch.full((9,), math.sqrt(2 / 9))
    scale[0] = math.sqrt(1 / 9)
    expected = (spectrum * turn).real / 2 * scale
    torch.testing.assert_close(dct_matrix(9) @ signal, expected)
    eye = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(dct_matrix(9) @ dct_matrix(9).T, eye)


def masked(feature, height, width, cutoff=0.1):
    """The low band of [B, F, height, width, C] by both transforms and a mask."""
    rows, columns = dct_matrix(height), dct_matrix(width)
    spectrum = torch.einsum("uh,vw,bfhwc->bfuvc", rows, columns, feature)
    for u in range(height):
        for v in range(width):
            if math.hypot(u, v) > cutoff * math.hypot(height - 1, width - 1):
                spectrum[:, :, u, v] = 0
    return torch.einsum("uh,vw,bfuvc->bfhwc", rows, columns, spectrum)


def test_the_low_band_is_a_masked_transform_of_every_frame():
    feature = torch.randn(2, 3, 32, 24, 2, dtype=torch.float64)
    low = low_band(32, 24)
    assert 1 < len(low) < 0.05 * 32 * 24
    found = project(feature.flatten(1, 3), low).view_as(feature)
    torch.testing.assert_close(found, masked(feature, 32, 24))
    with pytest.raises(lesa.LesaError, match="769 tokens are not frames of 768"):
        project(torch.zeros(1, 769, 2, dtype=torch.float64), low)


def test_layouts_tell_the_grid_and_what_the_first_attention_gets(case):
    layout, core = known_layout(case.pipe.transformer), core_of(case.pipe.transformer)
    block = first_block(core, model_spec(core))
    given = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
        ),
        block.attn.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["hidden_states"]), with_kwargs=True
        ),
    ]
    run(case.pipe, case.call())
    for hook in hooks:
        hook.remove()
    (args, kwargs), attended = given[:2]
    tokens = kwargs.get("hidden_states", args[0] if args else None)
    time = kwargs.get("temb", args[2] if args else None)
    assert torch.equal(layout.modulated(block, tokens, time), attended)


def test_freqca_is_its_formula(case):
    schedule = Schedule.explicit([0, 1, 3, 6], STEPS)
    result, seen, use = applied(case, freqca(schedule))
    branches = len(seen) // STEPS
    assert use.full_steps() == 4 and use.cache_bytes() > 0
    table = HiCache(order=2, sigma=0.71).table(schedule)
    grid = {"flux": (8, 8), "qwen": (4, 4), "hunyuan-video": (4, 4)}[case.name]
    for branch in range(branches):
        passes = seen[branch::branches]
        features = {s: passes[s].feature.double() for s in schedule.full_steps}
        for s in schedule.skipped_steps:
            assert not passes[s].full
            past = [features[p] for p in schedule.cached_before(s, 3)]
            bands = [table.apply(past, s), past[0]]
            shape = (len(past[0]), -1, *grid, past[0].shape[-1])
            low = [masked(band.view(shape), *grid).flatten(1, 3) for band in bands]
            torch.testing.assert_close(
                passes[s].feature.double(), bands[0] - low[0] + low[1], rtol=1e-4, atol=1e-5
            )
    assert not torch.equal(result, case.plain)


def test_everything_full_is_the_plain_run(case):
    every = Schedule.every(1, STEPS)
    for manager in (freqca(every), teacache(0.5, (1.0,))):
        result, _, use = applied(case, manager)
        assert torch.equal(result, case.plain) and use.full_steps() == STEPS


def test_teacache_sums_up_and_adds_the_last_residual(case):
    """With P = 1 every third step is full, and the last one."""
    _, seen, use = applied(case, teacache(3.0, (1.0,)))
    branches = round(sum(one.full for one in seen) / use.full_steps())
    residual, steps = {}, {}
    order = iter(seen)
    for index in range(STEPS):
        for branch in range(branches):
            probe = next(order)
            assert not probe.full
            if index in (0, 3, 6, 7):
                whole = next(order)
                assert whole.full
                residual[branch] = whole.feature - whole.tokens
                steps.setdefault(branch, []).append(index)
            else:
                torch.testing.assert_close(probe.feature, probe.tokens + residual[branch])
    assert next(order, None) is None and use.full_steps() == 4


def test_teacache_uses_the_relative_change_of_the_modulated_input(case):
    """P(rho) = rho: the thresholds at which a step is full are the changes themselves."""
    changes = []
    result, _, use = applied(case, teacache(0.0, (), changes))
    assert torch.equal(result, case.plain) and use.full_steps() == STEPS
    assert all(change > 0 and output > 0 for change, output in changes)
    branches = len(changes) // (STEPS - 1)
    first = changes[0][0]
    lower = max(change for change, _ in changes[:branches])
    for threshold, expected in ((first * 0.99, True), (lower * 1.01, False)):
        _, seen, _ = applied(case, teacache(threshold, (0.0, 1.0)))
        after = seen[2 * branches :]  # both passes of the first step in every branch
        assert after[1].full is expected


def test_polynomials_are_recovered():
    points = [(x / 20, 0.3 - x / 20 + 2 * (x / 20) ** 4) for x in range(1, 20)]
    assert fit_polynomial(points) == pytest.approx((0.3, -1, 0, 0, 2), abs=1e-9)


def test_speca_without_doubt_is_a_taylor_series(case):
    result, _, use = applied(case, speca(1e30))
    assert use.full_steps() == 3
    first = Schedule.explicit([0, 1, 2], STEPS)
    with lesa.accelerate(case.pipe, Taylor(2, tap="hidden"), schedule=first):
        expected = run(case.pipe, case.call())
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_speca_in_doubt_verifies_and_recomputes(case):
    """Threshold 0: every draft is followed by a full step."""
    _, seen, use = applied(case, speca(0.0))
    assert use.full_steps() == 3 + 2  # 0, 1, 2, 4, 6


def test_the_verifying_block_makes_the_feature_from_true_inputs(case):
    kept = []

    class Watched(SpeCa):
        def _keep(self, denoiser, step, state, args, kwargs):
            output = super()._keep(denoiser, step, state, args, kwargs)
            picture, text, feature = state.features[0]
            time = self.without_blocks(denoiser, args, kwargs, feature.clone())[2]
            given = {"hidden_states": picture, "encoder_hidden_states": text, "temb": time}
            again = self._last(**{**state.arguments, **given})[self.layout.picture]
            kept.append(mean_error(again, feature))
            return output

    from lesa.evaluation.peers.controller import controlled

    with controlled(case.pipe, lambda model: Watched(model, 1.0)):
        run(case.pipe, case.call())
    assert max(kept) == 0


def test_the_verification_is_paid_for():
    """A draft of SpeCa costs more than one of FreqCa, by the last block."""
    pipe, call = build("flux")
    settings = {name: value for name, value in call().items() if name != "generator"}
    settings["num_inference_steps"] = 6
    costs = {}
    for name, manager in (
        ("plain", freqca(Schedule.every(1, 6))),
        ("freqca", freqca(Schedule.explicit([0, 1, 2], 6))),
        ("speca", speca(1e30)),
    ):
        with manager(pipe):
            costs[name] = step_flops(pipe, "", settings, 5)[4]
    blocks = 4  # two double, two single ones, the last among them
    assert costs["freqca"] + costs["plain"] / (4 * blocks) < costs["speca"] < costs["plain"]


@pytest.mark.parametrize("wanted", [3, 10, 17])
def test_the_threshold_spends_as_few_full_steps_as_allowed(monkeypatch, wanted):
    monkeypatch.setattr(thresholds, "generate", lambda *_: None)

    def count(threshold):
        return math.ceil(50 / (1 + 40 * threshold))

    class Applied:
        def __init__(self, threshold):
            self.threshold = threshold

        def __call__(self, pipe):
            return self

        def __enter__(self):
            return Use(lambda: 0, lambda: count(self.threshold))

        def __exit__(self, *_):
            pass

    found = threshold_for(wanted, Bench(50, None, {}, ("a", "b")), Applied)
    fewest = min(count(i / 1e4) for i in range(20000) if count(i / 1e4) >= wanted)
    assert count(found) == fewest


@pytest.mark.parametrize("name", ["teacache", "speca"])
def test_a_threshold_is_found_on_calibration_prompts(name):
    pipe, call = build("flux")
    settings = {key: value for key, value in call().items() if key != "generator"}
    bench = Bench(STEPS, pipe, settings, ("a prompt",))
    method = ADAPTIVE[name].build(name, 4, bench, None)
    assert method.one_by_one and method.wanted == 4 and "threshold" in method.note
    assert 4 <= thresholds.mean_full_steps(bench, method.applied) < STEPS
    assert polynomial_for(bench) is polynomial_for(bench)  # fitted once


def test_who_cannot_run_says_why():
    pipe, _ = build("flux")
    assert ADAPTIVE["freqca"].unfit(Bench(8, pipe)) is None
    assert "calibration" in ADAPTIVE["teacache"].unfit(Bench(8, pipe))
    assert ADAPTIVE["speca"].unfit(Bench(8, pipe, calibration=("a",))) is None
    other, _ = build("sdxl")
    for peer in ADAPTIVE.values():
        assert "UNet2DConditionModel" in peer.unfit(Bench(8, other, calibration=("a",)))
    assert "pipeline" in ADAPTIVE["freqca"].unfit(Bench(8))
