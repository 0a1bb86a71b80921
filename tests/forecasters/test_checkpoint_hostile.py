"""Folders of a forecaster that are damaged or made to harm: one sentence, nothing waited for."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from shaken_forecasters import PLAN, SIGMAS, random_rows, shaken

from lesa.errors import LesaError
from lesa.forecasters import LesaForecaster

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    forecaster = shaken(history=2)
    forecaster.correct(PLAN, SIGMAS, "cond", random_rows(forecaster))
    made = torch.randn(50, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    forecaster.moments.keep(SIGMAS, {"cond": made @ made.T}, latent=False)
    forecaster.save_pretrained(tmp_path / "it")
    return tmp_path / "it"


def refused(folder, told):
    with pytest.raises(LesaError, match=told) as caught:
        LesaForecaster.from_pretrained(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def change(folder, edit):
    """Other tensors, with a hash that fits them."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    rehash(folder)


def rehash(folder):
    config = json.loads((folder / CONFIG).read_text())
    config["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))


def put(path, kind):
    """Something else in the place of a file."""
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "empty":
            path.touch()
        case "sparse":
            with path.open("wb") as file:
                file.truncate(10 << 30)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "empty", "sparse"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_something_else_in_the_place_of_a_file(folder, name, kind):
    put(folder / name, kind)
    refused(folder, name)


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_config_in_another_coding_is_the_same(folder, coding):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_bytes(text.encode(coding))
    assert LesaForecaster.from_pretrained(folder).calibrated == [PLAN]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"dtype"', '"dtype": "float32", "dtype"', "the key 'dtype' is there twice"),
        ("\n}", ",\n}", "Expecting property name|trailing comma"),
        ('"metadata": {}', '"metadata": {"a": NaN}', "NaN is no number of JSON"),
        ('"metadata": {}', '"metadata": {"a": ' + "[" * 999 + "]" * 999 + "}", "brackets"),
        ('"metadata": {}', '"metadata": {"seed": 1e999}', "seed=inf: not a whole number"),
        ('"metadata": {}', '"metadata": {"call": []}', "call=.*not an object"),
        ('"metadata": {}', '"metadata": {"noise": 1}', "noise=1: neither true nor false"),
        ('"seed": 0', f'"seed": {10**30}', "seed=10000.*: not a whole number of -"),
        ('"windows": ', '"windows": [1e9], "x": ', "unknown field 'x'|windows"),
        ('"num_steps": 50,\n    "w', '"num_steps": 9999999999,\n    "w', "num_steps=9999999999"),
    ],
)
def test_a_config_that_is_almost_one(folder, old, new, told):
    text = (folder / CONFIG).read_text()
    assert old in text
    head, _, tail = text.rpartition(old) if old == "\n}" else text.partition(old)
    (folder / CONFIG).write_text(head + new + tail)
    refused(folder, told)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        (10, "not a safetensors file"),
        (2**63, "a header of 9223372036854775808 bytes"),
        (0, "none|not"),
    ],
)
def test_a_header_that_claims_another_size(folder, size, told):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(size.to_bytes(8, "little") + data[8:])
    rehash(folder)
    refused(folder, told)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}},
        {"a": {"dtype": "\u202e", "shape": [1], "data_offsets": [0, 4]}},
        {"__metadata__": {"x": "y" * (20 << 20)}},
        {"__metadata__": {"x": {"deep": 1}}},
        {"__metadata__": []},
        [],
    ],
    ids=range(9),
)
def test_a_header_of_another_kind(folder, header):
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    rehash(folder)
    refused(folder, f"{WEIGHTS} is not a safetensors file")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ["experts.cond.1", "rows.0.cond", "moments.gram.cond"])
def test_values_that_no_training_gives(folder, name, wrong):
    """Each stored tensor: the form's parameters, fitted rows, what damping goes by."""

    def edit(tensors):
        key = next(key for key in tensors if name in key)
        tensors[key].view(-1)[-2] = wrong

    change(folder, edit)
    if name == "experts.cond.1" and wrong == 1e30:  # the fitted rows are what runs
        assert LesaForecaster.from_pretrained(folder).calibrated == [PLAN]
        return
    refused(folder, "not finite|below 1000|no inner products|step=")


@pytest.mark.parametrize("fields", [{}, {"form": "paper", "nodes": 8}], ids=str)
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_forms_own_rows_are_bounded(tmp_path, fields, calibrated):
    """Where no rows were fitted, the form makes them."""
    forecaster = shaken(**fields)
    if calibrated:
        forecaster.recommend(PLAN, SIGMAS)
    forecaster.save_pretrained(tmp_path)
    LesaForecaster.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in forecaster.parameters():
            parameter.mul_(1e4)
    forecaster.save_pretrained(tmp_path)
    refused(tmp_path, "rows of 'cond': coefficients of magnitude .* below 1000")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_another_dtype(folder, dtype):
    def edit(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)

    change(folder, edit)
    refused(folder, "is torch.*, not float32")


def test_moments_that_belong_to_nothing(folder):
    def edit(tensors):
        gram = tensors["moments.gram.cond"]
        gram.copy_(torch.full_like(gram, -1.0).fill_diagonal_(1.0))

    change(folder, edit)
    refused(folder, "moments of 'cond' are no inner products")
