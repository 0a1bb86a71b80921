from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from lesa_kernels import config, tune
from lesa_kernels.config import Config, file_of, lookup, programs
from lesa_kernels.examples import examples

from lesa.errors import LesaError


def test_every_kernel_has_a_safe_default():
    names = {example.kernel for example in examples((1, 4, 32)).values()}
    entries = json.loads(file_of("default").read_text())["kernels"]
    assert set(entries) == names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: lookup(name, torch.empty(2, 8), 3) for name in names}
    assert all(c.block >= c.threads and c.programs > 0 for c in found.values())


def test_the_nearest_shape_wins(tmp_path, monkeypatch):
    def entry(columns, history, block):
        shape = {"size": 4096 * columns, "columns": columns, "history": history, "itemsize": 2}
        return {"shape": shape, "config": Config(block, 128, 1)._asdict()}

    entries = [entry(64, 3, 1), entry(3072, 3, 2), entry(3072, 8, 3)]
    file_of("default", tmp_path).write_text(json.dumps({"kernels": {"mix": entries}}))
    monkeypatch.setenv("LESA_KERNEL_CONFIGS", str(tmp_path))
    config._entries.cache_clear()
    config._nearest.cache_clear()
    try:
        tall = torch.empty(4096, 3072, dtype=torch.bfloat16)
        assert lookup("mix", tall, 4).block == 2
        assert lookup("mix", tall, 7).block == 3
        assert lookup("mix", tall[:, :48], 3).block == 1
    finally:
        config._entries.cache_clear()
        config._nearest.cache_clear()


def test_an_unknown_device_is_warned_of_once():
    name = "Untuned GPU (test)"
    config._entries.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"Untuned.*python -m lesa_kernels\.tune"):
        assert config._entries(name) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config._entries(name)
    assert file_of(name).name == "untuned-gpu-test.json"


def test_programs_share_the_work_evenly(monkeypatch):
    monkeypatch.setattr(config, "multiprocessors", lambda device: 10)
    device, shape = torch.device("cpu"), Config(1024, 128, 2)
    assert programs(device, shape, 7) == 7
    assert programs(device, shape, 20) == 20
    assert programs(device, shape, 21) == 11  # two rounds of 11 and 10, not 20 and 1


def test_tuning_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="times kernels on a GPU, and PyTorch sees none"):
        tune.main([])


def test_search_takes_the_fastest_and_refuses_a_wrong_one(device):
    example = examples((1, 4, 32), device=device)["mix"]
    candidates = [Config(128, 128, 1), Config(256, 128, 1), Config(512, 128, 1)]
    speeds, seen = {128: 3.0, 256: 1.0, 512: 2.0}, []

    def watched(config, **rest):
        seen.append(config)
        example.launch(**rest, config=config)

    best, time = tune.search(
        replace(example, launch=watched), lambda run: run() or speeds[seen[-1].block], candidates, 1
    )
    assert (best, time) == (candidates[1], 1.0)

    def wrong(config, out, **rest):
        example.launch(**rest, out=out, config=config)
        out[-1, -1, -1] += config is candidates[2]

    with pytest.raises(LesaError, match="mix is wrong with Config.block=512"):
        tune.search(replace(example, launch=wrong), lambda run: 1.0, candidates)


def test_what_tune_writes_is_what_lookup_reads(tmp_path, monkeypatch, device):
    chosen = [Config(128, 128, 3)]
    monkeypatch.setattr(tune, "HISTORIES", (1,))
    one = {"mix": examples((1, 4, 32), 1, device=device)["mix"]}
    monkeypatch.setattr(tune, "examples", lambda *args, **kwargs: one)
    path = tune.tune(tmp_path, device, "Some GPU", lambda run: 1.0, [(1, 4, 32)], chosen)
    monkeypatch.setenv("LESA_KERNEL_CONFIGS", str(tmp_path))
    config._entries.cache_clear()
    assert path == file_of("Some GPU", tmp_path)
    assert Config(**config._entries("Some GPU")["mix"][0]["config"]) == chosen[0]
