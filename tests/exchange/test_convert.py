"""The authors' checkpoints: read without running them, with the forecasts of their equations."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
from published_schedulers import TINY
from torch.nn.functional import silu

from lesa import LesaError, LesaForecaster, Schedule
from lesa.exchange.convert import MODELS, convert, full_steps_of

HIDDEN, STEPS, WINDOWS = 6, 12, (4, 8, 8)


@dataclass
class KANConfig:
    hidden_dim: int = HIDDEN


@dataclass
class Config:
    kan: KANConfig = field(default_factory=KANConfig)


def parameters(branches=("",), steps=STEPS, scale=1.0, dtype=torch.bfloat16):
    """Random parameters in the release's layout, large enough to leave the splines' grid."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    knots = (torch.arange(-3, 9) * 1.2 - 3).to(dtype)
    found = {}
    for suffix in branches:
        for stage, window in enumerate(WINDOWS):
            found[f"latent{suffix}.{stage}.weight"] = random(1, window) * 0.1
            found[f"latent{suffix}.{stage}.bias"] = random(1) * 0.1
            sizes = [steps + 1, HIDDEN, HIDDEN, 1]
            for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
                name = f"timestep{suffix}.{stage}.layers.{i}"
                found[f"{name}.base_weight"] = random(outputs, inputs)
                found[f"{name}.spline_weight"] = random(outputs, inputs, 8)
                found[f"{name}.spline_scaler"] = random(outputs, inputs)
                found[f"{name}.grid"] = knots.expand(inputs, -1).contiguous()
    return found


def write(path, state, monkeypatch=None):
    """As the release's save_model does: its config is a class of its own, which is pickled."""
    content = {"model": state, "optimizer": {"state": {}}, "scheduler": {"gamma": 0.5}}
    if monkeypatch is not None:
        module = ModuleType("predictor.model.config")
        with monkeypatch.context() as patched:
            for name in ("predictor", "predictor.model"):
                patched.setitem(sys.modules, name, ModuleType(name))
            patched.setitem(sys.modules, module.__name__, module)
            for kind in (Config, KANConfig):
                setattr(module, kind.__name__, kind)
                patched.setattr(kind, "__module__", module.__name__)
            torch.save({"config": Config(), **content}, path)
    else:
        torch.save(content, path)
    return path


def spline(j, x, degree=3):
    """The textbook's B-spline j on even knots, 5 intervals on [-3, 3]."""
    knots = [-3 + (j + i - 3) * 1.2 for i in range(degree + 2)]
    if degree == 0:
        return float(knots[0] <= x < knots[1])
    left = (x - knots[0]) / (knots[-2] - knots[0]) * spline(j, x, degree - 1)
    return left + (knots[-1] - x) / (knots[-1] - knots[1]) * spline(j + 1, x, degree - 1)


def gate(state, suffix, stage, tau):
    """alpha = KAN(tau), edge by edge, in float64."""
    x = tau
    for i in range(3):
        name = f"timestep{suffix}.{stage}.layers.{i}"
        base, weight, scaler = (
            state[f"{name}.{part}"].double()
            for part in ("base_weight", "spline_weight", "spline_scaler")
        )
        basis = torch.tensor([[spline(j, float(v)) for j in range(8)] for v in x]).double()
        x = base @ silu(x) + (scaler * torch.einsum("oij,ij->oi", weight, basis)).sum(1)
    return float(x[0])


def generation(state, suffix, features, full, sigmas, bounds):
    """Eqs. 4-7, autoregressive: z = w . h + b, h_hat = h_{s-1} + KAN(t_s - t_i) z."""
    history, found = [], []
    for step, feature in enumerate(features):
        if step not in full:
            stage = sum(sigmas[step] <= bound for bound in bounds)
            weight = state[f"latent{suffix}.{stage}.weight"][0].double()
            window = history[-len(weight) :]
            window = [window[0]] * (len(weight) - len(window)) + window
            z = weight @ torch.stack(window) + state[f"latent{suffix}.{stage}.bias"].double()
            tau = sigmas[step] - torch.tensor(sigmas, dtype=torch.float64)
            feature = history[-1] + gate(state, suffix, stage, tau) * z
        history.append(feature)
        found.append(feature)
    return torch.stack(found)


def by_table(table, features):
    """What the engine does with a table whose forecasts enter the ring."""
    ring, found = [], []
    for step, feature in enumerate(features):
        if not table.schedule.is_full(step):
            feature = table.bias[step] + sum(
                float(c) * ring[-1 - k] for k, c in enumerate(table.coefficients[step]) if c
            )
        ring.append(feature)
        found.append(feature)
    return torch.stack(found)


@pytest.mark.parametrize(
    "branches, model, stages",
    [(("",), "flux-dev", (0.9, 0.5)), (("_cond", "_uncond"), "qwen-image", (0.9, 0.4))],
)
def test_forecasts_are_those_of_the_papers_equations(
    tmp_path, monkeypatch, branches, model, stages
):
    state = parameters(branches)
    path = write(tmp_path / "predictor_flux_N4_E2.pt", state, monkeypatch)
    convert(path).save_pretrained(tmp_path / "out")
    made = LesaForecaster.from_pretrained(tmp_path / "out")
    (entry,) = made.calibrations
    assert entry.schedule.full_steps == full_steps_of(4, 2, STEPS) == (0, 1, 3, 5, 9)
    assert made.metadata["converted_model"] == model and made.settings.stages == stages
    assert entry.sigmas == pytest.approx(MODELS[model].sigmas(STEPS, *[MODELS[model].size] * 2))
    features = torch.randn(STEPS, 7, dtype=torch.float64)
    stage_of = {sum(s <= b for b in stages) for s in entry.sigmas[:-1]}
    assert stage_of == {0, 1, 2}
    for suffix, branch in zip(branches, made.branches, strict=True):
        expected = generation(
            state, suffix, features, entry.schedule.full_steps, entry.sigmas, stages
        )
        found = by_table(made.table(entry.schedule, entry.sigmas, branch), features)
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < 1e-5  # float32 parameters and gate against float64
        assert (expected - features).abs().max() > 0.1


def test_without_the_ending_of_its_splines_it_would_be_another_forecast(tmp_path):
    """The hidden values of the check above leave the grid, so that it sees how splines end."""
    state = parameters()
    made = convert(write(tmp_path / "predictor_flux_N4_E2.pt", state))
    first = made.net.gates["cond"][2][0](made.net.offsets(made.calibrations[0].sigmas))
    assert first.abs().max() > 3


@pytest.mark.parametrize(
    "interval, first, steps, published",
    [
        (5, 3, 50, (0, 1, 2, 3, *range(7, 50, 5))),
        (7, 3, 50, (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)),
        (10, 3, 50, (0, 1, 2, 3, 12, 22, 32, 42)),
    ],
)
def test_the_rule_of_the_release_gives_the_lists_of_the_paper(interval, first, steps, published):
    assert full_steps_of(interval, first, steps) == published
    assert Schedule.every(interval, steps).full_steps == published


@pytest.mark.parametrize(
    "model, tiny, tokens",
    [
        ("flux-dev", "flux", 4096),
        ("qwen-image-lightning", "qwen", 6889),
        ("hunyuan-video", "hunyuan-video", 0),
    ],
)
def test_noise_levels_are_those_of_diffusers(model, tiny, tokens):
    scheduler = TINY[tiny].make()
    given = {"sigmas": [1 - s / STEPS for s in range(STEPS)]}
    if scheduler.config.use_dynamic_shifting:
        low, high = (scheduler.config[f"{end}_image_seq_len"] for end in ("base", "max"))
        share = (tokens - low) / (high - low)
        span = scheduler.config.max_shift - scheduler.config.base_shift
        given["mu"] = scheduler.config.base_shift + span * share
    scheduler.set_timesteps(**given)
    size = MODELS[model].size
    assert MODELS[model].sigmas(STEPS, size, size) == pytest.approx(
        scheduler.sigmas.tolist(), abs=1e-6
    )


def test_levels_that_end_at_a_terminal_one_are_those_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    kind = MODELS["qwen-image"]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    mu = 0.5 + (0.9 - 0.5) * (83 * 83 - 256) / (8192 - 256)
    scheduler.set_timesteps(sigmas=[1 - s / STEPS for s in range(STEPS)], mu=mu)
    assert kind.sigmas(STEPS, 1328, 1328) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_a_parameter_dict_alone_and_prefixes_are_read(tmp_path):
    state = parameters(steps=4)
    plain = convert(write(tmp_path / "a_N3_E1.pt", state))
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "b_N3_E1.pt")
    prefixed = convert(tmp_path / "b_N3_E1.pt")
    assert plain.metadata["converted_model"] == "flux-schnell"
    for name, value in plain.state_dict().items():
        assert torch.equal(prefixed.state_dict()[name], value)


class Payload:
    def __reduce__(self):
        return print, ("ran",)


def wrong_files(tmp_path):
    """A file each, with what its sentence says."""
    state = parameters()
    grid = "timestep.1.layers.2.grid"
    changed = {
        "has no tensor 'latent.2.bias'": {k: v for k, v in state.items() if k != "latent.2.bias"},
        "no checkpoint of the release": {"weight": torch.ones(1)},
        "values that are not finite": {**state, "latent.1.bias": torch.tensor([math.nan])},
        "it was moved in training": {**state, grid: state[grid] + 0.3},
        "no spline layer": {**state, "timestep.0.layers.0.spline_weight": torch.ones(2, 3, 8)},
        "not \\[S \\+ 1, h, h, 1\\]": {**state, **_narrower(state)},
        "holds no parameters": 3,
        "which is not loaded": {"latent.0.weight": Payload()},
    }
    for told, content in changed.items():
        path = tmp_path / f"{len(told)}_N4_E2.pt"
        torch.save({"model": content}, path)
        yield path, told
    text = tmp_path / "text_N4_E2.pt"
    text.write_text("no checkpoint")
    yield text, "no checkpoint of tensors"
    yield tmp_path / "none.pt", "cannot be read"


def _narrower(state):
    name = "timestep.0.layers.1"
    parts = ("base_weight", "spline_weight", "spline_scaler")
    return {f"{name}.{part}": state[f"{name}.{part}"][:3] for part in parts}


def test_what_is_no_checkpoint_is_one_sentence(tmp_path, capsys):
    for path, told in wrong_files(tmp_path):
        with pytest.raises(LesaError, match=told) as caught:
            convert(path)
        assert "\n" not in str(caught.value), told
    assert "ran" not in capsys.readouterr().out


def test_what_the_name_does_not_say_must_be_given(tmp_path):
    path = write(tmp_path / "predictor.pt", parameters())
    with pytest.raises(LesaError, match="^interval=None: the name 'predictor.pt' does not say"):
        convert(path)
    assert len(convert(path, interval=3, first_enhance=1).calibrated[0].full_steps) == 4
    with pytest.raises(LesaError, match="^model='flux': unknown; choose from flux-dev"):
        convert(path, interval=3, first_enhance=1, model="flux")
    with pytest.raises(LesaError, match="^model='qwen-image': it has the branches cond, uncond"):
        convert(path, interval=3, first_enhance=1, model="qwen-image")
    with pytest.raises(LesaError, match="^interval=0: not a whole number"):
        convert(path, interval=0, first_enhance=1)
