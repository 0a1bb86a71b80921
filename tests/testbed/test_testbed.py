"""The embedded pipeline: what is shipped is what its scripts make."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from importlib import import_module

import numpy as np
import pytest
import torch
from lesa_testbed import FOLDER, checker
from lesa_testbed.makers.flux import Plan
from lesa_testbed.scenes import clips, render, render_batch, render_clips, scenes
from lesa_testbed.text import clip_tokenizer, t5_tokenizer, vocabulary
from lesa_testbed.train import MAKERS
from typer.testing import CliRunner

import lesa.testbed
from lesa.cli import app
from lesa.errors import LesaError
from lesa.evaluation.judges import attributes
from lesa.testbed import captions, load, prompts, settings


@pytest.mark.parametrize("name", lesa.testbed.PIPELINES)
def test_the_weights_are_those_of_the_record(name):
    folder = FOLDER / name
    record = json.loads((folder / "training.json").read_text())
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*.safetensors")}
    assert set(files) == set(record["sha256"])
    for file, path in files.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"][file], file
    maker, plan = MAKERS[name]
    made = getattr(import_module(f"lesa_testbed.makers.{maker}"), plan)()
    assert record["plan"] == json.loads(json.dumps(asdict(made)))


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 48e6


def test_the_tokenizers_are_made_alike_in_every_process():
    """The trainer of the first one used to number its tokens in the order of a hash map."""
    pipe = load("flux")
    for made, shipped in ((clip_tokenizer(), pipe.tokenizer), (t5_tokenizer(), pipe.tokenizer_2)):
        assert made.get_vocab() == shipped.get_vocab()
        for word in vocabulary():
            assert made(word).input_ids == shipped(word).input_ids


def test_every_word_is_one_token():
    clip = clip_tokenizer()
    assert all(len(clip(word).input_ids) == 3 for word in vocabulary())
    assert max(len(clip(caption).input_ids) for caption in captions(500)) <= 20


def test_no_test_caption_comes_from_a_training_seed():
    assert captions(50, split="test") == captions(50, split="test")
    assert len(set(captions(300, split="test"))) == 300
    assert set(captions(50, split="test")) != set(captions(50, split="train"))


def test_the_checker_asks_for_what_training_never_showed():
    trained = {scene.caption for scene in scenes(Plan().free_scenes)}
    asked = checker.unseen(200)
    assert len(set(asked)) == 200 and not trained & set(asked)
    assert trained & set(captions(200))  # or the filter would not be needed


def test_the_checker_finds_nothing_wrong_with_the_scenes_themselves():
    drawn = scenes(40, seed=3, split="test")
    found = checker.accuracy(np.stack([render(s) for s in drawn]), [s.caption for s in drawn])
    assert found == {"shape": 1.0, "colour": 1.0, "place": 1.0}


def test_the_checker_sees_moving_scenes_move():
    drawn = clips(12, seed=3, split="test")
    videos = (render_clips(drawn).permute(0, 2, 3, 4, 1).numpy() + 1) / 2
    captions = [clip.caption for clip in drawn]
    right = checker.accuracy(videos, captions)
    assert right == {"shape": 1.0, "colour": 1.0, "place": 1.0, "motion": 1.0}
    assert checker.accuracy(videos[:, ::-1], captions)["motion"] == 0
    with np.errstate(all="raise"):
        assert not checker.drifts(np.zeros_like(videos[0]), captions[0])


def test_the_checker_notices_another_caption():
    drawn = scenes(40, seed=3, split="test")
    shuffled = [s.caption for s in drawn[1:] + drawn[:1]]
    found = checker.accuracy(np.stack([render(s) for s in drawn]), shuffled)
    assert max(found.values()) < 0.6


@pytest.mark.parametrize("name", ["flux", "qwen", "hunyuan"])
def test_what_a_caption_says_survives_the_autoencoder(name):
    """The first one of the videos lost colours; the denoiser behind it could not be right."""
    video = name == "hunyuan"
    drawn = clips(24, seed=3, split="test") if video else scenes(24, seed=3, split="test")
    pictures = render_clips(drawn) if video else render_batch(drawn)
    vae = load(name).vae
    with torch.no_grad():
        given = pictures[:, :, None] if name == "qwen" else pictures
        decoded = vae.decode(vae.encode(given).latent_dist.mean).sample.reshape(pictures.shape)
    decoded = (decoded.clamp(-1, 1) + 1) / 2
    right = checker.accuracy(decoded.movedim(1, -1).numpy(), [part.caption for part in drawn])
    assert right.pop("shape") >= 0.8
    assert set(right.values()) == {1.0}


@pytest.mark.parametrize("name", lesa.testbed.PIPELINES)
def test_every_embedded_pipeline_runs_and_skips(name):
    pipe, call = load(name), settings(name) | {"num_inference_steps": 4, "output_type": "pt"}
    text = prompts(name, 1)
    plain = pipe(text, generator=torch.Generator().manual_seed(0), **call)[0]
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.explicit((0, 2), 4)):
        fast = pipe(text, generator=torch.Generator().manual_seed(0), **call)[0]
        stats = lesa.stats(pipe)
    assert fast.shape == plain.shape == (1, *(9,) * (plain.ndim - 4), 3, 64, 64)
    branches = 2 if "true_cfg_scale" in call and call["true_cfg_scale"] > 1 else 1
    assert (stats.full, stats.skipped, dict(stats.fallbacks)) == (2 * branches, 2 * branches, {})


def test_an_unknown_pipeline_is_refused():
    with pytest.raises(LesaError, match="'nothing' is neither embedded"):
        load("nothing")
    with pytest.raises(LesaError, match="'sd' is not embedded"):
        settings("sd")


@pytest.fixture
def uninstalled(monkeypatch):
    """Takes lesa-testbed away."""
    for name in {"lesa_testbed", *sys.modules}:
        if name.partition(".")[0] == "lesa_testbed":
            monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda: load("sdxl"), "pipeline='sdxl'"),
        (lambda: load("schnell"), "pipeline='schnell'"),
        (lambda: prompts("qwen", 3), "captions=3"),
        (lambda: attributes(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), ["a fox"]), "judge="),
    ],
)
def test_without_the_test_bed_one_sentence_tells_how_to_get_it(uninstalled, asked, words):
    with pytest.raises(LesaError) as told:
        asked()
    assert str(told.value).startswith(words)
    remedy = "are not installed; run `pip install ./testbed` in a checkout of lesa"
    assert str(told.value).endswith(f": the embedded pipelines {remedy}")


def test_the_demo_without_the_test_bed_ends_with_status_2(uninstalled, tmp_path):
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert done.exit_code == 2 and "pip install ./testbed" in done.output
