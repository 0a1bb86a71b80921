"""Pipelines of other people, from a folder that save_pretrained wrote, through the command line."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
from saved_pipelines import save
from typer.testing import CliRunner

import lesa
from lesa import testbed
from lesa.cli import app

STEPS, FULL = "6", "3"
QUICK = ("--polish", "0", "--form", "table")  # the form whose first fit takes no time


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run(*args):
    result = invoke(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(*args) -> str:
    """The one sentence of a command that ends with status 2."""
    result = invoke(*args)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def prompts(tmp_path) -> dict[str, Path]:
    """Files of two prompts each: to train on, and to measure on."""
    files = {}
    for split in ("train", "test"):
        files[split] = tmp_path / f"{split}.txt"
        files[split].write_text("\n".join(testbed.captions(2, seed=9, split=split)))
    return files


def from_train_to_inspect(pipeline: Path, prompts, options, tmp_path, how=QUICK) -> dict:
    """All four commands on one pipeline; what `inspect` tells of the forecaster."""
    out, pictures = tmp_path / "forecaster", tmp_path / "pictures"
    steps = ["--num-inference-steps", STEPS, *options]
    counts = ["--full-steps", FULL]
    test = ["--prompts", prompts["test"]]
    run("train", pipeline, "--prompts", prompts["train"], *steps, *counts, *how, "--out", out)
    using = ["--forecaster", out, *counts]
    made = json.loads(
        run("generate", pipeline, *test, *steps, *using, "--out", pictures, "--json", "-").stdout
    )
    assert made["stats"]["skipped"] > 0 and made["stats"]["fallbacks"] == {}
    pictures = [file for file in made["files"] if file.endswith(".png")]
    assert len(pictures) == 2 and all(Path(file).stat().st_size for file in made["files"])
    compared = json.loads(
        run(
            "compare", pipeline, *test, *steps, *using, "--methods", "lesa,fora", "--json", "-"
        ).stdout
    )
    assert {row["method"] for row in compared["rows"]} == {"lesa", "fora"}
    return json.loads(run("inspect", out, "--json", "-").stdout)


@pytest.mark.parametrize("name", ["sd3", "pixart", "wan"])
def test_a_saved_pipeline_from_train_to_inspect(name, prompts, tmp_path):
    folder = tmp_path / "some where" / name
    options = save(name, folder)
    how = ("--polish", "0") if name == "sd3" else QUICK
    told = from_train_to_inspect(folder, prompts, options, tmp_path, how)
    metadata = told["metadata"]
    assert metadata["model_id"] == name  # and nothing of where it lay
    assert str(tmp_path) not in json.dumps(metadata)


def test_stable_diffusion_as_it_is_shipped(prompts, tmp_path):
    """Its scheduler cannot be trained with: the sentence names one that can, and it does."""
    folder = tmp_path / "sd15"
    options = save("sd15", folder)
    told = refused(
        *("train", folder, "--prompts", prompts["train"], "--num-inference-steps", STEPS, *options),
        *("--full-steps", FULL, "--out", tmp_path / "none"),
    )
    assert "PNDMScheduler" in told and "--scheduler ddim" in told
    told = from_train_to_inspect(folder, prompts, [*options, "--scheduler", "ddim"], tmp_path)
    assert told["metadata"]["scheduler"] == "DDIMScheduler"


@pytest.mark.parametrize(
    ("kind", "learned", "warns"),
    [
        ("PNDMScheduler", True, True),  # its levels repeat, and a trained forecaster goes by them
        ("PNDMScheduler", False, False),
        ("HeunDiscreteScheduler", True, True),
        ("HeunDiscreteScheduler", False, True),
        ("DDIMScheduler", True, False),
    ],
)
def test_enable_says_in_one_warning_what_its_scheduler_allows(kind, learned, warns, tmp_path):
    """What it says is what then happens, and its remedy works as it is written."""
    save("sd15", tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    timesteps = pipe.scheduler.timesteps
    call = {"num_inference_steps": 6, "height": 8, "width": 8, "output_type": "latent"}
    forecaster = lesa.LesaForecaster(uses_latent=False) if learned else "taylor-1"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lesa.enable(pipe, forecaster, full_steps=3)
    told = [str(w.message) for w in caught if "scheduler=" in str(w.message)]
    assert pipe.scheduler.timesteps is timesteps  # it was not touched
    pipe("a circle", **call)
    skipped = lesa.stats(pipe).skipped
    assert bool(skipped) is not warns and len(told) == warns
    if not warns:
        return
    assert kind in told[0] and "every step is computed in full" in told[0]
    assert "--scheduler ddim" in told[0]
    remedy = re.search(r"pipe\.scheduler = .*\)", told[0])
    exec(remedy[0], {"pipe": pipe, "diffusers": diffusers})
    pipe("a circle", **call)
    assert lesa.stats(pipe).skipped


def test_a_copy_of_flux_called_at_its_default_size(tmp_path, prompts):
    """The copy does not know its size: diffusers' default shifts every level to 1. What the
    sentence says works when it is followed."""
    folder = tmp_path / "flux"
    for source in testbed.folders("flux"):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    train = ("train", folder, "--prompts", prompts["train"], "--num-inference-steps", STEPS)
    train += ("--set", "max_sequence_length=20", "--full-steps", FULL, *QUICK)
    told = refused(*train, "--out", tmp_path / "none")
    assert "1, 1, 1, 1, 1, 1, 0: the shift of this size" in told or "1, 1, 1, ..., 1, 0" in told
    height, width = re.findall(r"--(?:height|width) (\d+)", told)
    assert "first-order" not in told and "--scheduler" not in told
    size = ("--height", height, "--width", width)
    run(*train, *size, "--out", tmp_path / "forecaster")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    lesa.enable(pipe, tmp_path / "forecaster")  # called at the size it was not trained for
    pipe("a circle", num_inference_steps=2, max_sequence_length=20, output_type="latent")
    (reason,) = lesa.stats(pipe).fallbacks
    assert f"pass height={height}, width={width}" in reason and "scheduler" not in reason[-40:]
