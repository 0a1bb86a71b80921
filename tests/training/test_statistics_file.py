"""Files of statistics that are damaged, or of something else: one sentence and its remedy."""

import errno
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lesa.errors import LesaError
from lesa.training.collector import Collector
from lesa.training.statistics import Statistics, inner_products
from lesa.training.work import Work

STEPS, ROWS = 6, {"cond": 1, "uncond": 1}
SIGMAS = tuple(1 - s / STEPS for s in range(STEPS + 1))


def made(pictures=2, num_latents=STEPS + 1, rows=ROWS):
    """Statistics of random vectors."""
    found = Statistics(SIGMAS, "output", num_latents, dict(rows), setting="a")
    generator = torch.Generator().manual_seed(1)
    grams = []
    for _ in range(pictures):
        basis = torch.randn(found.joint_size, 300, dtype=torch.float64, generator=generator)
        basis[-1] = 1
        grams.append(inner_products(basis))
    found.extend(torch.stack(grams), [f"prompt {i}" for i in range(pictures)])
    return found


@pytest.fixture
def path(tmp_path):
    made().save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def refused(path, told):
    with pytest.raises(LesaError, match=told) as caught:
        Statistics.load(path)
    text = str(caught.value)
    assert text.startswith("statistics file") or str(path) in text
    assert text.endswith("delete it and collect again") and text.isprintable()


def change(path, meta=None, gram=None):
    with safe_open(path, "pt") as file:
        known = json.loads(file.metadata()["lesa"])
    tensors = load_file(path)
    known = meta(known) if meta else known
    tensors = {"gram": gram(tensors["gram"]).contiguous()} if gram else tensors
    save_file(tensors, path, metadata={"lesa": json.dumps(known)})


@pytest.mark.parametrize("num_latents", [0, STEPS, STEPS + 1])
@pytest.mark.parametrize("rows", [{"cond": 1}, {"default": 2}, ROWS], ids=str)
def test_what_was_saved_comes_back(tmp_path, num_latents, rows):
    statistics = made(3, num_latents, rows)
    statistics.save(tmp_path / "s")
    again = Statistics.load(tmp_path / "s")
    assert torch.equal(again.joint, statistics.joint)
    assert vars(again) == {**vars(statistics), "joint": again.joint}


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda m: [m], r"metadata=\[.*not an object"),
        (lambda m: {**m, "format": 1}, "metadata.format=1: not a whole number of 2 to 2"),
        (lambda m: {**m, "colour": 1}, "unknown field 'colour'"),
        (lambda m: {k: v for k, v in m.items() if k != "tap"}, "metadata has no tap"),
        (lambda m: {**m, "tap": "middle"}, "tap='middle': not one of"),
        (lambda m: {**m, "sigmas": None}, "sigmas=None: not a list"),
        (lambda m: {**m, "sigmas": [0.5, None]}, r"sigmas\[1\]=None"),
        (lambda m: {**m, "sigmas": m["sigmas"][::-1]}, "do not strictly decrease"),
        (lambda m: {**m, "sigmas": m["sigmas"][1:]}, "not those of 5 steps"),
        (lambda m: {**m, "num_latents": 3}, "num_latents=3"),
        (lambda m: {**m, "num_latents": 10**30}, "num_latents=1000"),
        (lambda m: {**m, "rows": {}}, r"rows=\{\}"),
        (lambda m: {**m, "rows": {"cond": 10**9}}, "rows.cond=1000000000: not a whole number"),
        (lambda m: {**m, "rows": {"cond": 64}}, r"gram is torch.float64 \[2, .*not float64 \[2 "),
        (lambda m: {**m, "prompts": []}, r"prompts=\[\]: 0 items"),
        (lambda m: {**m, "prompts": ["a", 3]}, r"prompts\[1\]=3: not a text"),
        (lambda m: {**m, "prompts": ["a", "b", "c"]}, r"not float64 \[3 pictures or a multiple"),
        (lambda m: {**m, "setting": {}}, "setting={}: not a text"),
    ],
)
def test_metadata_that_no_collection_writes(path, edit, told):
    change(path, meta=edit)
    refused(path, told)


def with_value(place, value):
    def edit(gram):
        gram[0, place] = value
        return gram

    return edit


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (with_value(0, float("nan")), "no inner products"),
        (with_value(3, float("inf")), "no inner products"),
        (with_value(0, -1.0), "no inner products"),
        (with_value(0, 1e308), "no inner products"),
        (with_value(2, 1e9), "no inner products"),
        (with_value(-1, 2.0), "no inner products"),
        (lambda g: g.float(), "torch.float32"),
        (lambda g: g.bool(), "torch.bool"),
        (lambda g: g[:, :-1], "not float64"),
        (lambda g: g[:0], "no inner products"),
        (lambda g: g[0], "not float64"),
        (lambda g: g[None], "not float64"),
    ],
    ids=range(12),
)
def test_matrices_that_no_collection_gives(path, edit, told):
    change(path, gram=edit)
    refused(path, told)


def test_without_matrices_or_metadata(path):
    tensors = load_file(path)
    save_file(tensors, path)
    refused(path, "metadata say nothing of it")
    save_file({"other": tensors["gram"]}, path)
    refused(path, "metadata say nothing of it")
    for text in ("[" * 100_000, "", '{"a": 1, "a": 2}'):
        save_file(tensors, path, metadata={"lesa": text})
        refused(path, "metadata say nothing of it")


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "empty", "sparse", "text"])
def test_something_else_in_the_place_of_the_file(path, kind):
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "empty":
            path.touch()
        case "text":
            path.write_text("[1, 2]" * 1000)
        case "sparse":
            with path.open("wb") as file:
                file.truncate(10 << 30)
    refused(path, "s.safetensors")


def test_a_full_disk_is_told_and_keeps_what_there_was(path, monkeypatch):
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(LesaError, match="No space left"):
            made(3).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("still", [(), (2,), tuple(range(STEPS))])
def test_weights_are_those_of_the_steps_that_move_the_latent(still):
    """An output of zeros, or a step that the sampler does not take, has no shares of its own."""
    draw = torch.Generator().manual_seed(3)
    outputs = torch.randn(2, STEPS, 300, dtype=torch.float64, generator=draw)
    outputs[:, [*still]] = 0
    latents = [torch.randn(300, dtype=torch.float64, generator=draw)]
    for step in range(STEPS):
        latents.append(latents[-1] - (3 * outputs[0, step] - 2 * outputs[1, step]) / STEPS)
    ones = torch.ones(1, 300, dtype=torch.float64)
    basis = torch.cat([outputs.flatten(0, 1), torch.stack(latents), ones])
    found = Statistics(SIGMAS, "output", STEPS + 1, {"default": 2})
    found.extend(inner_products(basis)[None], ["a prompt"])
    assert found.mean("default").isfinite().all()
    weights = found.weights("default")
    if len(still) == STEPS:
        assert weights is None
    else:
        assert weights is not None and weights.tolist() == pytest.approx([3, -2], abs=1e-6)


def test_a_plain_run_that_is_not_finite_is_told():
    collector = Collector("output", Work())
    collector.sigmas = SIGMAS
    values = [torch.ones(1, 1, 8) for _ in range(STEPS)]
    values[3][0, 0, 2] = float("nan")
    collector.features = {"cond": values}
    with pytest.raises(LesaError, match="pipe: the plain run gives values that are not finite"):
        collector.reduce(torch.ones(1, 8))
