"""`lesa generate`: what it takes from the forecaster, further arguments, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lesa import LesaForecaster, Schedule, testbed
from lesa.cli import app, requests
from lesa.cli.calls import call_settings, full_steps_of, further_arguments
from lesa.cli.pictures import NO_VIDEO, file_name
from lesa.cli.rehearsal import rehearse
from lesa.cli.saved import look_at
from lesa.errors import LesaError
from lesa.forecasters.target import QUALITIES
from lesa.forecasters.worth import Worth


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """For 3 and 2 of 8 full steps, at a size and with an argument of its own."""
    folder = tmp_path_factory.mktemp("trained")
    texts = folder / "p.txt"
    texts.write_text("\n".join(testbed.captions(1, seed=1, split="train")))
    run(
        "train", "flux", "--prompts", texts, "--out", folder / "forecaster", "--polish", 0,
        "--num-inference-steps", 8, "--full-steps", "3,2", "--height", 56, "--guidance-scale", 2,
        "--set", "max_sequence_length=16",
    )  # fmt: skip
    return folder / "forecaster"


def test_what_is_not_given_is_as_in_training(trained, tmp_path):
    facts = tmp_path / "facts.json"
    common = ("generate", "flux", "--forecaster", trained, "--prompt", "a red circle")
    text = run(*common, "--out", tmp_path / "out", "--json", facts)
    told = json.loads(facts.read_text())
    expected = {"height": 56, "width": 64, "guidance_scale": 2.0, "max_sequence_length": 16}
    assert expected.items() <= told["settings"].items()
    assert (told["stats"]["full"], told["stats"]["skipped"]) == (2, 6)  # 8 / 5 is nearer to 2
    assert "2 of 8 steps in full" in text
    assert Image.open(told["files"][0]).size == (64, 56)
    run(*common, "--out", tmp_path / "out", "--json", facts, "--height", 64, "--full-steps", 3)
    told = json.loads(facts.read_text())
    assert told["settings"]["height"] == 64 and told["stats"]["full"] == 3


@pytest.mark.parametrize(
    ("target", "count"),
    [(("--target-speedup", 2.7), 2), (("--target-psnr", 40), 3), (("--quality", "fast"), 2)],
)
def test_the_full_steps_that_reach_a_target(trained, tmp_path, target, count):
    """With measurements made by hand, of which only 3 of 8 have 40 dB."""
    forecaster = LesaForecaster.from_pretrained(trained)
    for entry in forecaster.calibrations:
        p10 = 15.0 * len(entry.schedule.full_steps)
        entry.worth = Worth(p10 + 1, p10, p10 - 1, 8, True, share=0.01)
    forecaster.save_pretrained(tmp_path / "measured")
    facts = tmp_path / "facts.json"
    text = run(
        "generate", "flux", "--forecaster", tmp_path / "measured", "--prompt", "a red circle",
        "--out", tmp_path / "out", "--json", facts, *target,
    )  # fmt: skip
    told = json.loads(facts.read_text())
    assert told["stats"]["full"] == count and f"{count} of 8 steps in full" in text
    assert told["stats"]["chosen"] in text and str(target[1]) in told["stats"]["chosen"]


def test_words_for_quality_are_those_of_the_library():
    assert requests.QUALITIES == QUALITIES


def test_arguments_of_another_class_are_not_taken_from_a_forecaster():
    metadata = {"call": {"max_sequence_length": 9, "true_cfg_scale": 3.0, "num_frames": 5}}
    forecaster = SimpleNamespace(metadata=metadata, calibrated=[])
    settings = call_settings(look_at("sdxl"), {"height": 56}, forecaster)
    assert settings == testbed.settings("sdxl") | {"height": 56}


@pytest.mark.parametrize(
    ("counts", "steps", "chosen"),
    [
        ({50: (13, 10, 8)}, 50, 10),
        ({50: (13, 8)}, 50, 8),
        ({50: (13, 10, 8), 20: (7,)}, 20, 7),  # those of this number of steps come first
        ({50: (13, 10, 8)}, 9, 8),
        ({50: (13, 10)}, 9, None),
        ({}, 50, None),
    ],
)
def test_which_count_of_full_steps_is_taken(counts, steps, chosen):
    calibrated = [
        Schedule.explicit(range(count), total) for total, some in counts.items() for count in some
    ]
    assert full_steps_of(SimpleNamespace(calibrated=calibrated), steps) == chosen


def test_further_arguments_are_python_literals_else_texts():
    pairs = ["a=4", "b=0.5", "c=[1, 2]", "d=None", "e=two words", "f-g=x=y", "h=", "i='4'"]
    assert further_arguments(pairs) == {
        "a": 4, "b": 0.5, "c": [1, 2], "d": None, "e": "two words", "f_g": "x=y", "h": "", "i": "4",
    }  # fmt: skip


def test_a_negative_prompt_and_a_further_argument_reach_the_pipeline(tmp_path):
    common = ("generate", "qwen", "--prompt", "a red circle", "--num-inference-steps", 3)

    def pixels(name: str, *options: object) -> torch.Tensor:
        facts = tmp_path / "facts.json"
        run(*common, "--out", tmp_path / name, "--json", facts, *options)
        (file,) = json.loads(facts.read_text())["files"]
        return torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)

    plain = pixels("plain")
    assert torch.equal(plain, pixels("same", "--negative-prompt", " "))
    assert not torch.equal(plain, pixels("negative", "--negative-prompt", "a red circle"))
    assert not torch.equal(plain, pixels("scale", "--set", "true_cfg_scale=1.0"))


def test_a_video_is_a_strip_and_an_mp4(tmp_path):
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    options = ("--num-inference-steps", 2, "--frames", 5, "--fps", 10, "--out", tmp_path)
    assert "1 video in" in run("generate", "hunyuan", "--prompt", "a red circle", *options)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".mp4", ".jsonl"}
    strip = Image.open(tmp_path / "0000-a-red-circle.png")
    assert strip.size == (5 * 64, 64)
    with imageio.get_reader(tmp_path / "0000-a-red-circle.mp4") as reader:
        frames = list(reader.iter_data())
        assert reader.get_meta_data()["fps"] == 10
    assert len(frames) == 5 and frames[0].shape == (64, 64, 3)
    first = torch.from_numpy(frames[0].copy()).float()
    drawn = torch.frombuffer(bytearray(strip.crop((0, 0, 64, 64)).tobytes()), dtype=torch.uint8)
    assert (first.flatten() - drawn.float()).abs().mean() < 16  # of 255: H.264 loses some


def test_a_video_without_the_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("lesa.cli.pictures.find_spec", lambda _: None)
    options = ("--num-inference-steps", 2, "--frames", 5, "--out", tmp_path)
    assert NO_VIDEO in run("generate", "hunyuan", "--prompt", "a", *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000-a.png", "manifest.jsonl"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red CIRCLE, and 2 squares!", "a-red-circle-and-2-squares"),
        ("ein grüner Würfel", "ein-grüner-würfel"),
        ("红色的圆", "红色的圆"),
        ("красный круг", "красный-круг"),
        ("हिन्दी में", "हिन्दी-में"),
        ("../../etc/passwd\\\n\x1b[31m\x00", "etc-passwd-31m"),
        ("🦊?!", "prompt"),
        ("  ", "prompt"),
    ],
)
def test_names_keep_the_letters_of_any_script(prompt, name):
    assert file_name(7, prompt) == f"0007-{name}"


@pytest.mark.parametrize("letter", ["a", "ü", "红", "\U00020000"])
def test_names_are_bounded_in_bytes(letter, tmp_path):
    name = file_name(0, letter * 400)
    assert 100 < len(name.encode()) <= 125 and set(name[5:]) == {letter}
    from lesa.util.files import write_atomically

    assert write_atomically(tmp_path / f"{name}.png", b"").exists()


@pytest.mark.parametrize(
    ("embedded", "wrong", "words"),
    [
        ("flux", {"height": 60}, "height=60: FluxPipeline takes multiples of 8; give 56 or 64"),
        ("qwen", {"width": 60}, "width=60: QwenImagePipeline takes multiples of 8; give 56 or 64"),
        ("sdxl", {"height": 60}, "height=60: StableDiffusionXLPipeline takes multiples of 8; give"),
        ("hunyuan", {"width": 60}, "width=60: HunyuanVideoPipeline takes multiples of 16; give 48"),
        ("flux", {"max_sequence_length": 999}, "max_sequence_length=999: FluxPipeline refuses it"),
        ("flux", {"max_sequence_length": -4}, "max_sequence_length=-4"),
        ("flux", {"num_images_per_prompt": "x"}, "num_images_per_prompt='x': FluxPipeline refuses"),
        ("flux", {"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ("flux", {"latents": "x"}, "latents='x'"),
        ("flux", {"joint_attention_kwargs": 3}, "joint_attention_kwargs=3"),
        ("hunyuan", {"num_frames": 6}, "frames=6: HunyuanVideoPipeline takes multiples of 4 p"),
    ],
)
def test_a_pipeline_is_asked_before_its_first_step(embedded, wrong, words):
    """Also where it would only warn, and round the size."""
    pipe, steps = testbed.load(embedded), []
    pipe.components.get("transformer", pipe.components.get("unet")).register_forward_pre_hook(
        lambda *_: steps.append(1)
    )
    settings = testbed.settings(embedded)
    rehearse(pipe, ["a red circle"], settings)
    with pytest.raises(LesaError) as caught:
        rehearse(pipe, ["a red circle"], settings | wrong)
    assert words in str(caught.value) and not steps
    assert "progress_bar" not in vars(pipe)


def test_a_size_that_a_saved_pipeline_refuses(tmp_path):
    testbed.load("flux").save_pretrained(tmp_path / "pipe")
    options = ("--prompt", "a", "--height", "60", "--width", "64", "--out", str(tmp_path / "out"))
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "pipe"), *options])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == ("lesa: height=60: FluxPipeline takes multiples of 8; give 56 or 64\n")
    assert not (tmp_path / "out").exists()
