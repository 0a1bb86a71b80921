"""The helpers of the benchmarks, on the CPU: `python -m pytest benchmarks`."""

from __future__ import annotations

import json
import time

import _formulas
import _timing
import bench_compare
import pytest
import torch
from _contenders import (
    _FORMULAS,
    DISTANCE,
    KERNELS,
    LIMIT,
    LIMITS,
    _dense,
    _features,
    _narrowed,
    _taylorseer,
    check,
    expected,
    tensors,
)
from _environment import command, environment, slug, write
from _timing import interleaved, ratios, repeats, rotation, summary, wall_timer
from bench_compare import added, kept
from make_results import weaker

from lesa.evaluation.comparison import Comparison


@pytest.fixture
def made():
    torch.manual_seed(0)
    return tensors((2, 5, 32), 3, torch.device("cpu"))


@pytest.mark.parametrize("name", KERNELS)
def test_formulas_compute_what_the_kernels_do(made, name):
    """In the tolerance that the benchmark itself applies to every contender."""
    function, arguments = _FORMULAS[name]
    example = made[name]
    found = _dense(_narrowed(function, example.arguments)(*arguments(example.arguments)))
    exact = expected(name, example)
    assert float((found - exact).norm() / exact.norm()) < LIMITS.get(name, LIMIT)


def test_the_fp8_ring_is_filled(made):
    arguments = made["mix_fp8"].arguments
    assert all(bool(arguments["ring"][slot].float().any()) for slot in range(3))


def test_a_kernel_that_does_not_write_is_caught(made):
    lazy = lambda: made["mix"].result  # noqa: E731
    with pytest.raises(SystemExit, match="triton mix at .* nothing is timed on wrong results"):
        check("mix", made["mix"], {"triton": [lazy]})
    right = lambda: expected("mix", made["mix"]).to(torch.bfloat16)  # noqa: E731
    assert check("mix", made["mix"], {"triton": [right], "copy": [lazy]})["triton"] < LIMIT
    push = made["push_fp8"]
    with pytest.raises(SystemExit):
        check("push_fp8", push, {"triton": [lambda: (push.result[0], push.arguments["scales"][0])]})


def test_taylorseers_update_is_its_series(made):
    arguments = made["mix"].arguments
    found = _formulas.taylorseer(_features(arguments), DISTANCE)
    exact = _taylorseer(arguments)
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 2e-2
    f = [x.double() for x in _features(arguments)]
    assert torch.allclose(exact, f[0] + 4 * f[1] + 8 * f[2])


def test_rounds_are_interleaved_and_warm_ups_do_not_count():
    order = []

    def timer(name, seconds):
        return lambda: order.append(name) or seconds

    rounds = []
    timers = {"a": timer("a", 2.0), "b": timer("b", 1.0)}
    found = interleaved(timers, 5, warmup=2, each_round=rounds.append)
    assert rounds == [{"a": [2.0] * n, "b": [1.0] * n} for n in range(1, 6)]
    assert found == {"a": [2.0] * 5, "b": [1.0] * 5} and len(order) == 14
    assert all(set(order[i : i + 2]) == {"a", "b"} for i in range(0, 14, 2))
    assert ratios(found, "a", "b")["median"] == 2.0


def test_nothing_begins_after_the_deadline(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: clock[0])

    def second():
        clock[0] += 1
        return 1.0

    timers = dict.fromkeys(("a", "b", "late"), second)
    failures: dict[str, str] = {}
    found = interleaved(timers, 9, warmup=0, deadline=1.5, failures=failures)
    assert found == {"a": [1.0], "b": [1.0]} and failures == {"late": "no time left"}
    assert summary(found["a"])["quartiles"] == [1.0, 1.0]
    with pytest.raises(TimeoutError, match="first round of 'a'"):
        interleaved(timers, 9, deadline=clock[0] - 1)
    found = interleaved(timers, 9, warmup=0, deadline=clock[0] + 3.5)
    assert found == dict.fromkeys(timers, [1.0])  # the second round is not whole


def test_a_contender_that_fails_leaves_the_others():
    def broken():
        raise ValueError("first line\nsecond line")

    failures = {}
    timers = {"a": lambda: 2.0, "broken": broken, "b": lambda: 1.0}
    assert interleaved(timers, 3, failures=failures) == {"a": [2.0] * 3, "b": [1.0] * 3}
    assert failures == {"broken": "ValueError: first line"}
    with pytest.raises(ValueError, match="first line"):
        interleaved(timers, 3)


def test_buffers_outgrow_the_cache():
    l2 = 50 << 20
    for nbytes in (800, 2 << 20, 100 << 20, 3 << 30):
        sets = rotation(nbytes, l2)
        assert sets >= 2 and sets * nbytes >= 3 * l2
        assert repeats(sets, nbytes) >= 1
    assert repeats(2, 100 << 20) == 21


def test_wall_time_ends_after_the_work():
    order = []
    seconds = wall_timer(lambda: time.sleep(0.01), lambda: order.append("sync"))()
    assert seconds >= 0.01 and order == ["sync", "sync"]


@pytest.mark.parametrize(
    ("name", "billions"), (("flux.1-dev", 11.90), ("qwen-image", 20.43), ("hunyuan-video", 12.82))
)
def test_full_size_means_the_published_number_of_parameters(name, billions):
    models = pytest.importorskip("_models")
    row = models.MODELS[name]
    with models.init_empty_weights():
        model = getattr(models.diffusers, row.transformer)(**row.config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def test_results_are_strict_json(tmp_path):
    write(tmp_path / "new" / "x.json", {"environment": environment(), "nan": float("nan")})
    text = (tmp_path / "new" / "x.json").read_text()
    assert '"nan": null' in text and '"commit"' in text and '"torch"' in text
    assert command(["/x/bench.py", "--out", "/tmp", "--rounds", "3"]) == [
        "bench.py",
        "--rounds",
        "3",
    ]
    assert slug("NVIDIA H200 80GB (x)") == "nvidia-h200-80gb-x"


def test_a_comparison_keeps_the_rows_of_methods_that_did_not_run():
    def row(method, count, schedule):
        return {
            "method": method,
            "label": f"{method} {schedule[:3]} @{count}",
            "full_steps": count,
            "schedule": schedule,
        }

    def report(rows, **more):
        curves = {each["label"]: [0.1] for each in rows}
        known = {"prompts": ["a"], "seed": 1, "settings": {}, "weights": "0", "notes": []}
        return {**known, "rows": rows, "error_per_step": curves, **more}

    own, there = row("fora", 10, "own: 0,5"), row("disca", 10, "searched: 0,3; 2 blocks")
    gone, mine = row("foca", 10, "searched: 0,2"), row("lesa", 10, "searched: 0,2")
    old = report([own, there, gone, mine], environment={"commit": "abc"})
    new = report([row("lesa", 10, "searched: 0,3"), row("fora", 8, "own: 0,7")])
    found = kept(old, new)
    assert [each["label"] for each in found["rows"]] == [
        "fora own @10", "disca sea @10", "lesa sea @10", "fora own @8",
    ]  # fmt: skip
    assert set(found["error_per_step"]) == {each["label"] for each in found["rows"]}
    assert found["notes"] == ["2 rows of other methods are kept from commit abc."]
    assert [each.get("commit") for each in found["rows"]] == ["abc", "abc", None, None]
    for changed in ({"prompts": ["b"]}, {"weights": "1"}):
        assert kept(old, {**new, **changed})["rows"] == new["rows"]


def test_two_partial_runs_leave_each_kept_row_the_commit_that_it_was_measured_at():
    def report(commit, *labels):
        rows = [{"method": label, "label": label, "schedule": "own: 0,5"} for label in labels]
        known = {"prompts": ["a"], "seed": 1, "settings": {}, "weights": "0", "notes": []}
        return {**known, "rows": rows, "error_per_step": {}, "environment": {"commit": commit}}

    first = report("one", "fora", "foca", "taylorseer-1")
    second = kept(first, report("two", "foca"))
    third = kept(second, report("three", "spectrum"))
    assert {row["label"]: row.get("commit") for row in third["rows"]} == {
        "fora": "one",
        "taylor-1": "one",  # by its name of today
        "foca": "two",
        "spectrum": None,  # the file's own
    }
    assert sorted(third["notes"]) == [
        "1 rows of other methods are kept from commit two.",
        "2 rows of other methods are kept from commit one.",
    ]


def test_rows_of_peers_alone_are_put_beside_those_that_the_file_has():
    def report(commit, **rows):
        found = [
            {"method": m, "label": m, "schedule": "own: 0,5", "value": v} for m, v in rows.items()
        ]
        curves = {label: [value] for label, value in rows.items()}
        at = {"environment": {"commit": commit}, "notes": [], "training": f"of {commit}"}
        return {"rows": found, "error_per_step": curves, **at}

    found = added(report("one", lesa=1, fora=2, foca=3), report("two", foca=4, dicache=5))
    assert [(row["method"], row["value"], row.get("commit")) for row in found["rows"]] == [
        ("lesa", 1, None), ("fora", 2, None), ("foca", 4, "two"), ("dicache", 5, "two"),
    ]  # fmt: skip
    assert found["error_per_step"] == {"lesa": [1], "fora": [2], "foca": [4], "dicache": [5]}
    assert (found["environment"], found["training"]) == ({"commit": "one"}, "of one")
    assert found["notes"] == ["2 rows of other methods were put in at commit two."]


def test_where_a_peer_is_ahead_the_form_with_a_network_is_named_too():
    def row(method, mean):
        label = {"method": method, "label": f"{method} @1", "full_steps": 1, "schedule": "own: 0"}
        return label | {"psnr_mean": mean, "psnr_min": mean}

    def told(*rows):
        part = {"rows": [*rows], "settings": {"num_inference_steps": 4}}
        return "".join(weaker({"schnell": part}))

    behind = told(row("lesa", 22.0), row("disca", 25.0))
    assert "in the mean by 3.0 dB on schnell with 1 of 4 steps in full (DisCa); in the" in behind
    both = told(row("lesa", 22.0), row("disca", 25.0), row("lesa-disca", 28.5))
    assert '(DisCa; with `form="disca"` lesa is 3.5 dB ahead); in the worst' in both
    assert "nowhere measured" in told(row("lesa", 26.0), row("disca", 25.0))


def test_a_run_of_peers_alone_writes_its_rows_into_the_file(monkeypatch, tmp_path):
    def row(method):
        more = {"full_steps": 5, "seconds": 1.0, "speedup": 2.0, "cache_bytes": 0, "psnr_min": 1.0}
        told = {"method": method, "label": f"{method} @5", "schedule": "own: 0", **more}
        return told | {"psnr_mean": 2.0, "psnr_p10": 1.5, "psnr": [2.0]}

    def measured(*of):
        return Comparison(["a"], {"num_inference_steps": 50}, [row("foca")], seed=1), {
            "weights": "0"
        }

    known = {"prompts": ["a"], "settings": {"num_inference_steps": 50}, "seed": 1, "weights": "0"}
    known |= {"rows": [row("lesa")], "error_per_step": {}, "notes": [], "environment": {}}
    write(tmp_path / "compare" / "flux.json", known)
    monkeypatch.setattr(bench_compare, "measure", measured)
    command = [
        "bench_compare.py",
        "--pipelines",
        "flux",
        "--methods",
        "foca",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", command)
    bench_compare.main()
    found = json.loads((tmp_path / "compare" / "flux.json").read_text())
    assert [each["label"] for each in found["rows"]] == ["lesa @5", "foca @5"]
    (tmp_path / "compare" / "flux.json").unlink()
    with pytest.raises(SystemExit, match="add lesa to the methods"):
        bench_compare.main()
