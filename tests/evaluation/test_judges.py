"""Judges against independent computations: the towers of CLIP in float64, and the checker itself.

Published weights are not at hand: CLIP is a small random model, ImageReward is a stand-in
that shows which calls it gets.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from lesa_testbed.checker import accuracy
from lesa_testbed.scenes import render_batch, render_clips, scenes
from PIL import Image

from lesa.errors import LesaError
from lesa.evaluation.judges import (
    ClipScore,
    ImageReward,
    attributes,
    named,
)

TEXTS = ["a red circle", "two blue squares on a dark background", "a ring", "green"]


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(4, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP of the real classes with the embedded pipeline's tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from lesa import testbed

    tokenizer = testbed.load("flux").tokenizer
    assert isinstance(tokenizer, CLIPTokenizer)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    marks = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    text = dict(**size, **marks, vocab_size=len(tokenizer), max_position_embeddings=20)
    vision = dict(**size, image_size=32, patch_size=8)
    torch.manual_seed(3)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():  # as drawn, all cosines of a random model are nearly alike
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    tokenizer.model_max_length = 20
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_the_towers_in_float64(clip_folder, pictures):
    from transformers import CLIPModel, CLIPProcessor

    scores = ClipScore(clip_folder)(None, pictures, TEXTS)["clip"]
    assert scores.shape == (4,) and (scores > 0).sum() >= 2  # not all are clamped
    model = CLIPModel.from_pretrained(clip_folder).double()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    for picture, text, score in zip(pictures, TEXTS, scores, strict=True):
        eight_bit = Image.fromarray((picture * 255).round().byte().movedim(0, -1).numpy())
        pixels = processor(images=eight_bit, return_tensors="pt")["pixel_values"].double()
        words = processor(text=text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            seen = model.vision_model(pixels).pooler_output @ model.visual_projection.weight.T
            read = model.text_model(words).pooler_output @ model.text_projection.weight.T
        cosine = torch.nn.functional.cosine_similarity(seen, read).item()
        assert float(score) == pytest.approx(100 * max(cosine, 0), abs=1e-3)


def test_clip_score_of_a_video_is_the_mean_over_its_frames(clip_folder, pictures):
    judge = ClipScore(clip_folder)
    whole = judge(None, pictures.reshape(2, 2, 3, 40, 56), TEXTS[:2])["clip"]
    frames = judge(None, pictures, [TEXTS[0]] * 2 + [TEXTS[1]] * 2)["clip"]
    assert whole.tolist() == pytest.approx(frames.reshape(2, 2).mean(1).tolist(), abs=1e-5)


def test_a_prompt_that_is_too_long_is_cut_not_refused(clip_folder, pictures):
    long = " ".join(["red"] * 200)
    assert ClipScore(clip_folder)(None, pictures[:1], [long])["clip"].isfinite().all()


def test_clip_needs_a_model(tmp_path):
    with pytest.raises(LesaError, match="clip=.*give a folder or a hub id"):
        ClipScore(tmp_path)


def test_image_reward_scores_each_picture_with_its_own_prompt(pictures, monkeypatch):
    seen = []

    class Model:
        def score(self, prompt, picture):
            seen.append((prompt, picture.size, picture.mode))
            return float(len(prompt)) + picture.getpixel((0, 0))[0] / 255

    package = SimpleNamespace(load=lambda name, device: Model())
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    found = ImageReward()(None, pictures, TEXTS)["image_reward"]
    red = (pictures[:, 0, 0, 0] * 255).round() / 255
    lengths = torch.tensor([len(text) for text in TEXTS])
    assert found.tolist() == pytest.approx((lengths + red).tolist(), abs=1e-5)
    assert seen == [(text, (56, 40), "RGB") for text in TEXTS]


def test_image_reward_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(LesaError, match="pip install image-reward"):
        ImageReward()


def test_attributes_are_those_of_the_checker():
    drawn = scenes(3, seed=4, split="test")
    texts = [scene.caption for scene in drawn]
    pictures = (render_batch(drawn) + 1) / 2
    swapped = [*texts[1:], texts[0]]
    for captions in (texts, swapped):
        found = attributes(None, pictures, captions)
        expected = accuracy(pictures.movedim(1, -1).numpy(), captions)
        assert {k: v.mean().item() for k, v in found.items()} == pytest.approx(expected)
    assert attributes(None, pictures, texts)["colour"].mean() > found["colour"].mean()


def test_attributes_of_videos_tell_motion():
    from lesa_testbed.scenes import clips

    drawn = clips(2, seed=1, split="test")
    videos = ((render_clips(drawn) + 1) / 2).movedim(1, 2)
    found = attributes(None, videos, [clip.caption for clip in drawn])
    assert found["motion"].tolist() == [1, 1]
    still = videos[:, :1].expand_as(videos)
    assert attributes(None, still, [clip.caption for clip in drawn])["motion"].tolist() == [0, 0]


def test_attributes_refuse_a_prompt_that_is_no_caption():
    with pytest.raises(LesaError, match="captions alone, not 'a red fox'"):
        attributes(None, torch.rand(1, 3, 8, 8), ["a red fox"])


@pytest.mark.parametrize("name", ["beauty", "clip", "clip=", ""])
def test_an_unknown_judge_is_told(name):
    with pytest.raises(LesaError, match="choose attributes, image-reward or clip=FOLDER"):
        named(name)


def test_a_judge_by_its_name(clip_folder):
    assert named("attributes") is attributes
    assert isinstance(named(f"clip={clip_folder}"), ClipScore)
