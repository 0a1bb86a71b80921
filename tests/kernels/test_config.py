from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from lesa_kernels import config, tune
from lesa_kernels.config import Config, file_of, lookup, programs
from lesa_kernels.examples import examples
from lesa_kernels.search import search

from lesa.errors import LesaError


@pytest.fixture
def forgotten():
    """Nothing is remembered of any device's files, before and after."""
    config._entries.cache_clear()
    config._nearest.cache_clear()
    yield
    config._entries.cache_clear()
    config._nearest.cache_clear()


def test_every_kernel_has_a_safe_default():
    names = {example.kernel for example in examples((1, 4, 32)).values()}
    entries = json.loads(file_of("default").read_text())["kernels"]
    assert set(entries) == names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: lookup(name, torch.empty(2, 8), 3) for name in names}
    assert all(c.block >= c.threads and c.programs > 0 for c in found.values())


def test_the_nearest_shape_wins(forgotten, tmp_path, monkeypatch):
    def entry(columns, history, block):
        shape = {"size": 4096 * columns, "columns": columns, "history": history, "itemsize": 2}
        return {"shape": shape, "config": Config(block, 128, 1)._asdict()}

    entries = [entry(64, 3, 1), entry(3072, 3, 2), entry(3072, 8, 3)]
    file_of("default", tmp_path).write_text(json.dumps({"kernels": {"mix": entries}}))
    monkeypatch.setenv("LESA_KERNEL_CONFIGS", str(tmp_path))
    tall = torch.empty(4096, 3072, dtype=torch.bfloat16)
    assert lookup("mix", tall, 4).block == 2
    assert lookup("mix", tall, 7).block == 3
    assert lookup("mix", tall[:, :48], 3).block == 1


def test_an_untuned_device_is_told_of_once_and_without_a_warning(forgotten, caplog):
    with caplog.at_level("DEBUG"), warnings.catch_warnings():
        warnings.simplefilter("error")
        entries = [config._entries("Untuned GPU (test)") for _ in range(2)]
    assert entries[0] == config._entries("default")
    [record] = caplog.records
    assert record.levelname == "DEBUG"
    assert re.search(
        r"Untuned GPU \(test\): default; python -m lesa_kernels\.tune", record.getMessage()
    )
    assert file_of("Untuned GPU (test)").name == "untuned-gpu-test.json"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA L20", "NVIDIA L20"),
    ],
)
def test_a_device_finds_its_family(name, family, forgotten, tmp_path, monkeypatch):
    path = next(config._files(name))
    assert json.loads(path.read_text())["device"] == family
    assert config.source(name) == ("tuned" if family == "NVIDIA H200" else "untimed")
    assert set(json.loads(path.read_text())["kernels"]) == set(config._entries("default"))
    own = {"shape": {"size": 1, "columns": 1, "history": 1, "itemsize": 2}, "milliseconds": 1.0}
    file_of(name, tmp_path).write_text(json.dumps({"kernels": {"mix": [own]}}))
    monkeypatch.setenv("LESA_KERNEL_CONFIGS", str(tmp_path))
    assert config.source(name) == "tuned"
    config._entries.cache_clear()
    assert config._entries(name)["mix"][0] == own and config._entries(name)["gram"]


@pytest.mark.parametrize("name", ["NVIDIA L200", "NVIDIA GH200 480GB", "default", "Tesla T4"])
def test_part_of_a_word_is_no_family(name):
    assert config.source(name) == "default"


def test_programs_share_the_work_evenly(monkeypatch):
    monkeypatch.setattr(config, "multiprocessors", lambda device: 10)
    device, shape = torch.device("cpu"), Config(1024, 128, 2)
    assert programs(device, shape, 7) == 7
    assert programs(device, shape, 20) == 20
    assert programs(device, shape, 21) == 11  # two rounds of 11 and 10, not 20 and 1


def test_tuning_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="2"):
        tune.main([])
    assert "times kernels on a GPU, and PyTorch sees none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--shapes", "1x4096x"], "'1x4096x' is no shape: write BxTxC"),
        (["--seconds", "-1"], "'-1' is no time: give seconds above 0"),
        (["--kernels", "mux"], "invalid choice: 'mux'"),
    ],
)
def test_what_the_command_refuses(given, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(given)
    assert sentence in capsys.readouterr().err


def test_search_takes_the_fastest_and_refuses_a_wrong_one(device):
    example = examples((1, 4, 32), device=device)["mix"]
    candidates = [Config(128, 128, 1), Config(256, 128, 1), Config(512, 128, 1)]
    speeds, seen = {128: 3.0, 256: 1.0, 512: 2.0}, []

    def watched(config, **rest):
        seen.append(config)
        example.launch(**rest, config=config)

    best, time = search(
        replace(example, launch=watched), lambda run: run() or speeds[seen[-1].block], candidates, 1
    )
    assert (best, time) == (candidates[1], 1.0)

    def wrong(config, out, **rest):
        example.launch(**rest, out=out, config=config)
        out[-1, -1, -1] += config is candidates[2]

    with pytest.raises(LesaError, match="mix is wrong with Config.block=512"):
        search(replace(example, launch=wrong), lambda run: 1.0, candidates)


@pytest.fixture
def searched(forgotten, tmp_path, monkeypatch, device):
    """`tune` of small features by a clock that counts calls, into a folder that lookup reads."""
    chosen = [Config(128, 128, 3)]
    monkeypatch.setattr(tune, "HISTORIES", (1,))
    monkeypatch.setenv("LESA_KERNEL_CONFIGS", str(tmp_path))

    def run(timer=lambda run: 1.0, **options):
        return tune.tune(tmp_path, device, "Some GPU", timer, [(1, 4, 32)], chosen, **options)

    return run


def test_what_tune_writes_is_what_lookup_reads(searched, tmp_path):
    path = searched(kernels=["mix"])
    assert path == file_of("Some GPU", tmp_path)
    entry = config._entries("Some GPU")["mix"][0]
    assert Config(**entry["config"]) == Config(128, 128, 3)
    assert entry["shape"] == {"size": 128, "columns": 32, "history": 1, "itemsize": 2}
    assert entry["share_of_copy"] == 1 and entry["gb_per_s"] == round(2 * 256 / 1e6, 1)


def test_a_second_search_adds_to_the_first(searched):
    searched(kernels=["mix"])
    path = searched(lambda run: 2.0, kernels=["mix", "gram"])
    kernels = json.loads(path.read_text())["kernels"]
    assert [entry["milliseconds"] for entry in kernels["mix"]] == [2.0]
    assert set(kernels) == {"mix", "gram"}


def test_what_was_found_before_a_failure_is_kept(searched, tmp_path):
    def fails_later(run):
        if isinstance(run, partial) and run.func.__self__.kernel == "gram":
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        searched(fails_later, kernels=["mix", "gram"])
    assert set(json.loads(file_of("Some GPU", tmp_path).read_text())["kernels"]) == {"mix"}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_search_that_no_longer_fits_is_named(searched, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock[0])

    def slow(run):
        clock[0] += 1
        return 1.0

    path = searched(slow, kernels=["mix", "gram"], seconds=0.5)
    assert set(json.loads(path.read_text())["kernels"]) == {"mix"}
    assert "no time was left for gram 1x4x32 K=1" in capsys.readouterr().err
