"""Step lists as other programs' files: what these read, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from json_schema import errors

from lesa import LesaError, LesaForecaster, Schedule
from lesa.exchange import cache_dit as masks
from lesa.exchange import sglang
from lesa.exchange.export import export
from lesa.exchange.step_lists import step_lists
from lesa.forecasters.guard import Guard
from lesa.forecasters.worth import Worth

STEPS = 12
SIGMAS = [3 * t / (1 + 2 * t) for t in (1 - s / STEPS for s in range(STEPS + 1))]
SCHEMA = json.loads((Path(__file__).parents[2] / "docs/step-lists.schema.json").read_text())
REQUEST = {
    "pipeline": "FluxPipelineConfig",
    "checkpoint": "790c92633540aa0cb11d9abf19eb46d861714758",
    "guidance_scale": 3.5,
    "height": 64,
    "width": 96,
    "quality": "lossless",
    "attention_backend": None,
    "scheduler_config_sha256": "ab" * 32,
}


def features(steps=STEPS, size=5):
    generator = torch.Generator().manual_seed(2)
    walk = torch.randn(steps, size, generator=generator, dtype=torch.float64)
    return 3 + walk.cumsum(0)


@pytest.fixture
def trained():
    """Two lists of two branches, rows of their own in one, as training leaves them."""
    metadata = {
        "model_class": "FluxTransformer2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "prompts": 7,
        "prompts_sha256": "0f" * 32,
        "call": {"height": 64, "width": 96, "guidance_scale": 3.5},
    }
    made = LesaForecaster("table", branches=("cond", "uncond"), metadata=metadata)
    for full in ((0, 3, 5, 8), (0, 1, 2, 4, 7, 10)):
        made.recommend(Schedule.explicit(full, STEPS), SIGMAS)
    plan = made.calibrations[0].schedule
    rows = made.table(plan, SIGMAS).coefficients * 1.5
    made.correct(plan, SIGMAS, "cond", rows, split=torch.stack([rows, -rows], -1))
    for entry in made.calibrations:
        entry.worth = Worth(40.0, 35.0, 30.0, 5, True, 0.01, 0.02, 0.1)
    gram = features() @ features().T
    made.moments.keep(SIGMAS, {"cond": gram, "uncond": gram}, latent=False)
    return made


def test_json_follows_its_schema_and_holds_the_tables(trained, tmp_path):
    (path,) = export(trained, "json", tmp_path)
    found = json.loads(path.read_text())
    assert list(errors(found, SCHEMA)) == []
    assert [one["full_steps"] for one in found["lists"]] == [[0, 3, 5, 8], [0, 1, 2, 4, 7, 10]]
    for one, entry in zip(found["lists"], trained.calibrations, strict=True):
        assert tuple(one["sigmas"]) == entry.sigmas and one["num_steps"] == STEPS
        for branch in trained.branches:
            table = trained.table(entry.schedule, entry.sigmas, branch)
            assert one["tables"][branch]["coefficients"] == table.coefficients.tolist()
    first = found["lists"][0]["tables"]["cond"]
    rows, opposite = (torch.tensor(part, dtype=torch.float64) for part in first["parts"])
    assert torch.equal(rows, -opposite) and rows.any()


ROUTED, SPENT = Schedule.explicit((0, 3, 6, 9), STEPS), Schedule.explicit((0, 3, 4, 5, 8), STEPS)


def test_json_holds_guards(trained, tmp_path):
    """Of one that changes to another list its tables too; where there is none, nothing."""
    one, other = trained.calibrations
    rows = {name: trained.table(ROUTED, SIGMAS, name).coefficients * 2 for name in one.rows}
    for name in set(trained.branches) - one.rows.keys():
        rows[name] = trained.table(ROUTED, SIGMAS, name).coefficients
    for guard in (Guard(3, 0.5, ROUTED, rows, share=0.1), Guard(3, 0.5, SPENT, share=0.1)):
        one.guard = guard
        (path,) = export(trained, "json", tmp_path)
        found = json.loads(path.read_text())
        assert list(errors(found, SCHEMA)) == []
        told = found["lists"][0]["guard"]
        assert told["full_steps"] == list(guard.schedule.full_steps) and told["limit"] == 0.5
        assert told["extra_steps"] == ([] if guard.rows else [4])
        assert [*told["tables"]] == (list(trained.branches) if guard.rows else [])
        for name, table in told["tables"].items():
            assert table["coefficients"] == rows[name].tolist()
        assert found["lists"][1]["guard"] is None and other.guard is None


def test_what_lists_alone_lose_is_told(trained, tmp_path):
    trained.calibrations[0].guard = Guard(3, 0.5, SPENT)
    with pytest.warns(UserWarning, match=r"guard: cache-dit .* 4-of-12 \(spend\): there pictures"):
        export(trained, "cache-dit", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(trained, "cache-dit", tmp_path, full_steps=[6])
        export(trained, "json", tmp_path)


def test_json_of_the_papers_form(tmp_path):
    paper = LesaForecaster("paper", num_steps=STEPS, nodes=4, tap="hidden")
    paper.recommend(Schedule.every(5, STEPS), SIGMAS)
    (path,) = export(paper, "json", tmp_path)
    found = json.loads(path.read_text())
    assert list(errors(found, SCHEMA)) == []
    table = found["lists"][0]["tables"]["cond"]
    assert table["autoregressive"] is True and len(table["bias"]) == STEPS


def test_the_schema_refuses_what_is_not_of_its_version(trained, tmp_path):
    (path,) = export(trained, "json", tmp_path)
    found = json.loads(path.read_text())

    def broken(*place, value):
        changed = inner = copy.deepcopy(found)
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        return list(errors(changed, SCHEMA))

    one = ("lists", 0)
    assert broken("version", value=2) == ["$.version: const"]
    assert broken("forecaster", "tap", value="first") == ["$.forecaster.tap: enum"]
    assert broken(*one, "full_steps", 1, value=-1) == ["$.lists.0.full_steps.1: minimum"]
    assert broken(*one, "num_steps", value=True) == ["$.lists.0.num_steps: type"]
    assert broken(*one, "sigmas", value=[1.0]) == ["$.lists.0.sigmas: minItems"]
    assert broken(*one, "tables", "cond", "coefficients", 0, value=["a"])
    assert broken(*one, "worth", value={}) == ["$.lists.0.worth: required"]


def test_cache_dit_runs_the_blocks_at_the_steps_of_the_list(tmp_path, tiny_flux, inputs):
    cache_dit = pytest.importorskip("cache_dit")
    made = LesaForecaster("table", branches=("cond",))
    made.recommend(Schedule.explicit((0, 3, 5, 8), STEPS), SIGMAS)
    (path,) = export(made, "cache-dit", tmp_path)
    assert path.name == "cache-dit-4-of-12.yaml"
    calls = Counter()
    model = tiny_flux.transformer
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for place, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, place=place: calls.update([place]))
    cache_dit.enable_cache(tiny_flux, **cache_dit.load_configs(str(path)))
    try:
        tiny_flux(**inputs(steps=STEPS))
    finally:
        cache_dit.disable_cache(tiny_flux)
    assert calls == {0: STEPS, **{place: 4 for place in range(1, len(blocks))}}


def test_cache_dit_of_guidance_in_two_calls(trained):
    (first, _) = step_lists(trained)
    found = masks.config(first)
    assert found["enable_separate_cfg"] is True
    assert found["steps_computation_mask"] == [1, 0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0]


def test_sglang_schedules_are_bound_to_the_request(trained, tmp_path):
    paths = export(trained, "sglang", tmp_path, request=REQUEST)
    assert [path.name for path in paths] == ["K5.json", "K6.json"]
    first, second = (json.loads(path.read_text()) for path in paths)
    assert first["schema"] == "sglang-dpcache-schedule-v2"
    assert first["full_steps"] == [0, 1, 3, 5, 8]  # a line needs two full steps
    assert first["calibration"]["searched_full_steps"] == [0, 3, 5, 8]
    assert second["full_steps"] == [0, 1, 2, 4, 7, 10] and second["num_full_steps"] == 6
    for found in (first, second):
        assert found["full_steps"][:2] == found["mandatory_full_steps"] == [0, 1]
        assert found["calibration"]["manifest_sha256"] == "0f" * 32
        assert found["calibration"]["num_samples"] == 7
        request = found["request"]
        assert {name: request[name] for name in REQUEST} == REQUEST
        assert request["do_classifier_free_guidance"] is True
        assert request["sigmas"] == torch.tensor(SIGMAS).tolist()  # as float32 has them
        assert request["timesteps"] == (torch.tensor(SIGMAS[:-1]) * 1000).tolist()
        assert math.isfinite(found["calibrated_cost"])


def test_the_cost_of_a_line_is_that_of_its_features():
    full, rows = [0, 1, 4, 9], features()
    expected = 0.0
    for step in (2, 3, 5, 6, 7, 8, 10, 11):
        i, j = [s for s in full if s < step][-2:]
        line = rows[j] + (rows[j] - rows[i]) / (j - i) * (step - j)
        expected += float((line - rows[step]).norm() / rows[step].norm())
    assert sglang.line_cost(rows @ rows.T, full) == pytest.approx(expected, rel=1e-9)


def test_a_request_is_read_of_what_sglang_wrote(trained, tmp_path):
    export(trained, "sglang", tmp_path / "a", request=REQUEST)
    schedule = tmp_path / "a" / "K5.json"
    alone = tmp_path / "request.json"
    alone.write_text(json.dumps(REQUEST))
    capture = tmp_path / "capture.pt"
    signature = json.loads(schedule.read_text())["request"]
    torch.save({"signature": {**signature, "sigmas": tuple(signature["sigmas"])}}, capture)
    for number, path in enumerate((schedule, capture)):
        (made, *_) = export(
            trained, "sglang", tmp_path / f"out{number}", request=sglang.read_request(path)
        )
        assert made.read_text() == schedule.read_text()
    assert sglang.read_request(alone) == REQUEST


def test_a_request_that_is_none_is_one_sentence(tmp_path):
    for name, content, told in (
        ("a.json", b"[1]", "holds no request"),
        ("b.json", b'{"request": 3}', "holds no request"),
        ("c.json", b"{", "is not a request"),
        ("d.pt", b"PK\x03\x04", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LesaError, match=told) as caught:
            sglang.read_request(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"checkpoint": None}, "^request.checkpoint=None: not a text"),
        ({"dtype": "float32"}, "^request.dtype='float32': not one of 'bfloat16'"),
        ({"height": 128}, "^request.height=128: the list was found at 64"),
        ({"num_inference_steps": 50}, "^request.num_inference_steps=50: the list is of 12"),
        ({"sigmas": [1 - s / 12 for s in range(13)]}, "^request.sigmas: they differ .* by 0.26"),
        ({"scheduler_config_sha256": "x" * 64}, "not 64 hexadecimal digits"),
        ({"cfg": 1}, "^request.cfg: SGLang's requests have no such field"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_request_that_does_not_fit_writes_nothing(trained, tmp_path, change, told):
    with pytest.raises(LesaError, match=told):
        export(trained, "sglang", tmp_path / "out", request={**REQUEST, **change})
    assert not (tmp_path / "out").exists()


def test_what_sglang_cannot_hold(trained, tmp_path):
    with pytest.raises(LesaError, match="^request: it lacks pipeline, checkpoint, quality"):
        export(trained, "sglang", tmp_path / "out")
    bare = LesaForecaster("table")
    bare.recommend(Schedule.explicit((0, 3), STEPS), SIGMAS)
    with pytest.raises(LesaError, match="^calibration=None: SGLang's schedule tells its cost"):
        export(bare, "sglang", tmp_path / "out", request=REQUEST)
    trained.recommend(Schedule.explicit((0, 1, 4, 6, 9), STEPS), SIGMAS)
    with pytest.raises(LesaError, match="^full-steps=5: .* as many as another list"):
        export(trained, "sglang", tmp_path / "out", request=REQUEST)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LesaError, match="it holds config.json, which would be read"):
        export(trained, "sglang", tmp_path, request=REQUEST, full_steps=[4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


@pytest.mark.parametrize(
    "to, version, told",
    [
        ("cache-dit", "1.4.2", "^engine-version='1.4.2': masks are written for cache-dit 1.5;"),
        ("cache-dit", "1.51", "masks are written for"),
        ("sglang", "v1", "^engine-version='v1': schedules are written in sglang-dpcache-sched"),
        ("json", "2", "^engine-version='2': lesa-step-lists is written in version 1 only"),
    ],
)
def test_an_engine_of_another_version(trained, tmp_path, to, version, told):
    with pytest.raises(LesaError, match=told):
        export(trained, to, tmp_path / "out", engine_version=version)
    assert not (tmp_path / "out").exists()


def test_the_engine_that_is_installed_is_looked_at(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "installed", lambda name: {"cache-dit": "1.6.0"}[name])
    with pytest.raises(LesaError, match="^cache-dit='1.6.0': masks are written for cache-dit 1.5"):
        export(trained, "cache-dit", tmp_path / "out")
    assert export(trained, "cache-dit", tmp_path / "out", engine_version="1.5.9")
    source = tmp_path / "site" / "sglang" / "multimodal_gen" / "runtime" / "cache" / "dpcache.py"
    source.parent.mkdir(parents=True)
    (tmp_path / "site" / "sglang" / "__init__.py").write_text("raise ImportError('not imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    for text, wrong in (
        ('SCHEDULE_SCHEMA = "sglang-dpcache-schedule-v3"\n', "sglang-dpcache-schedule-v3"),
        ("", ""),
    ):
        source.write_text(text)
        with pytest.raises(LesaError, match=f"^sglang='{wrong}': the SGLang installed here reads"):
            export(trained, "sglang", tmp_path / "s", request=REQUEST)
    source.write_text('SCHEDULE_SCHEMA = "sglang-dpcache-schedule-v2"\n')
    assert export(trained, "sglang", tmp_path / "s", request=REQUEST)


def test_lists_by_their_counts(trained, tmp_path):
    paths = export(trained, "cache-dit", tmp_path, full_steps=[6])
    assert [path.name for path in paths] == ["cache-dit-6-of-12.yaml"]
    with pytest.raises(LesaError, match="^full-steps=5: not calibrated, only 6, 4; choose"):
        export(trained, "json", tmp_path, full_steps=[5])
    with pytest.raises(LesaError, match=r"^calibrated=\[\]: the forecaster has no step list"):
        export(LesaForecaster("table"), "json", tmp_path)
    with pytest.raises(LesaError, match="^to='cachedit': unknown; choose from cache-dit, sglang"):
        export(trained, "cachedit", tmp_path)
    with pytest.raises(LesaError, match="^request: --to json asks for none"):
        export(trained, "json", tmp_path, request=REQUEST)
