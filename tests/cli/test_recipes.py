"""Recipes: what they hold, what wins over them, what a plan says without weights."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from doc_blocks import ROOT, blocks_of
from safetensors.torch import save_file
from saved_pipelines import save
from tiny_pipelines import build
from typer.testing import CliRunner

from lesa import LesaForecaster
from lesa.cli import app, inputs
from lesa.cli.meta_run import measure
from lesa.cli.preparation import Preparation
from lesa.cli.published import Published
from lesa.cli.recipe import OPTIONS, SHARED, read_recipe, recipe_names
from lesa.cli.requests import TrainRequest
from lesa.cli.run_request import RunRequest
from lesa.errors import LesaError
from lesa.training.collect import collect
from lesa.training.job import Job
from lesa.util.progress import Progress

ASIDE = {"config", "json", "dry_run", "step_seconds"}
TINY = {"num-inference-steps": 6, "full-steps": [3], "form": "table", "prompts": "lesa:2"}


def told(*words: object) -> str:
    """The one sentence of a command that ends with status 2."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def written(folder: Path, **values: Any) -> Path:
    """A recipe of some values, with hyphens for underscores."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({key.replace("_", "-"): v for key, v in values.items()}))
    return file


@pytest.fixture(scope="module")
def sd3(tmp_path_factory) -> dict[str, Any]:
    """A recipe for a tiny pipeline on disk, with its model."""
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    save("sd3", folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    return {"pipeline": str(folder), "height": 8, "width": 8, "model": model_of(pipe), **TINY}


def model_of(pipe: Any, call: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a recipe would hold of a pipeline that is there."""
    width, pooled = (pipe.transformer.config.get(f"{n}_dim", 32) for n in (
        "joint_attention", "pooled_projection"
    ))  # fmt: skip
    shapes = {"prompt_embeds": [6, width], "pooled_prompt_embeds": [pooled]}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    if call is not None:
        shapes = {n: [*v.shape[1:]] for n, v in call.items() if isinstance(v, torch.Tensor)}
    there = {name: getattr(pipe, name, None) for name in ("vae", "guider")}
    parts = {name: part for name, part in there.items() if part is not None}
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": type(pipe.transformer).__name__,
        "config": plain(pipe.transformer),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler-config": plain(pipe.scheduler),
        "parts": {name: type(part).__name__ for name, part in parts.items()},
        "parts-config": {name: plain(part) for name, part in parts.items()},
        "text": shapes,
    }


def plain(part: Any) -> dict[str, Any]:
    """A part's configuration as YAML has it."""
    known = inspect.signature(type(part)).parameters
    return json.loads(json.dumps({k: v for k, v in part.config.items() if k in known}))


def test_the_keys_are_the_options():
    assert set(OPTIONS) == {field.name for field in fields(TrainRequest)} - ASIDE
    assert set(SHARED) == {field.name for field in fields(RunRequest)} - ASIDE


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_lesa_names_what_there_is(name):
    """Classes of diffusers, fields that these have, and arguments that the pipeline takes."""
    recipe = read_recipe(name)
    model, preparation = recipe.model, recipe.preparation
    assert recipe.title and recipe.licence and model.source and preparation.device_bytes
    for key in ("pipeline", "dtype", "height", "num_inference_steps", "full_steps", "prompts"):
        assert key in recipe.options
    for kind, config in (
        (model.denoiser, model.config),
        (model.scheduler, model.scheduler_config),
        (model.scheduler, preparation.scheduler_config),
    ):
        assert set(config) <= set(inspect.signature(model.kind(kind)).parameters)
    taken = inspect.signature(model.kind(model.pipeline).__call__).parameters
    assert {pair.partition("=")[0] for pair in recipe.options.get("set", ())} <= set(taken)
    assert set(model.text) <= set(taken)
    text = (ROOT / "recipes" / f"{name}.yaml").read_text()
    assert "\n# cost: at most " in text, "python benchmarks/make_recipes_table.py"
    assert f"[{name}](" in (ROOT / "docs" / "recipes.md").read_text()


def test_the_recipes_are_those_that_were_promised():
    families = ("flux.1-dev", "flux.1-schnell", "flux.2", "qwen-image", "qwen-image-lightning")
    families += ("hunyuanvideo", "hunyuanvideo-1.5", "wan2.1", "wan2.2", "sdxl", "sd3.5", "ltx")
    assert all(any(name.startswith(family) for name in recipe_names()) for family in families)


@pytest.mark.parametrize("name", ["flux", "qwen", "sd3", "wan", "hunyuan-video-15"])
def test_a_plan_counts_what_training_then_computes(name, tmp_path):
    """Rows, and bytes of what is kept and cached, of a real collection of the same pipeline."""
    pipe, call = build(name)
    given = call()
    for extra in ("generator", "output_type", "num_inference_steps"):
        del given[extra]
    model = Published.read("config", {
        key.replace("-", "_"): value for key, value in model_of(pipe, given).items()
    })  # fmt: skip
    settings = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
    found = measure(model, settings, torch.float32)
    job = Job(pipe, ["a prompt"], given, "output", 0, 1, tmp_path, Progress(quiet=True))
    collect(job, 4)
    assert found.parameters == sum(p.numel() for p in pipe.transformer.parameters())
    assert found.rows == job.work.rows / 4
    assert found.feature_bytes == job.work.feature_bytes
    assert found.argument_bytes == job.work.argument_bytes
    assert 4 * (found.latent_bytes + found.output_bytes) == job.kept_base(4).nbytes
    if name == "hunyuan-video-15":  # whose forward sorts tokens by their mask
        assert found.flops is None
    else:
        assert found.flops > 2 * found.rows * weights_of_blocks(pipe)


def weights_of_blocks(pipe: Any) -> int:
    """Multiplications that a row cannot do without: one for each weight of a block."""
    blocks = getattr(pipe.transformer, "transformer_blocks", None) or pipe.transformer.blocks
    return sum(p.numel() for p in blocks.parameters() if p.ndim > 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "published"), [("flux.1-dev", "flux.1-dev"), ("sdxl", "sdxl")])
def test_operations_are_those_of_flops_only(name, published):
    from lesa.evaluation.flops import flops_rows

    recipe = read_recipe(name)
    known = {"guidance_scale": recipe.options["guidance_scale"], "height": 1024, "width": 1024}
    found = measure(recipe.model, known, torch.bfloat16)
    counted = flops_rows(published)[0]["tflops_full_step"]
    assert found.flops / 1e12 == pytest.approx(counted, rel=0.01)


def test_a_dry_run_prints_the_plan_and_leaves_nothing(sd3, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_pipeline", None)
    recipe = written(tmp_path, title="Tiny", licence="none", out=str(tmp_path / "out"), **sd3)
    words = ["train", "--config", str(recipe), "--dry-run", "--step-seconds", "2", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["prompts"] == 2 and plan["full_steps"] == [3] and plan["branches"] == 2
    share = 3  # MOST of few prompts, see lesa.training.budget
    assert plan["cost"]["generations"] == 2 * (1 + share)
    assert plan["cost"]["full_steps"] == 6 * plan["cost"]["generations"]
    assert plan["cost"]["seconds"] == 2 * plan["cost"]["full_steps"]
    assert plan["cost"]["rows"] == 2 * plan["cost"]["full_steps"]
    assert "at most 8 plain generations = 48 full steps = 96 rows" in result.stderr
    assert "licence        none" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_it_trains_and_the_command_line_wins(sd3, tmp_path):
    recipe = written(tmp_path, out="nowhere", polish=0, **sd3)
    out = tmp_path / "out"
    words = ["train", "--config", recipe, "--full-steps", "2", "--out", out]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    (plan,) = LesaForecaster.from_pretrained(out).calibrated
    assert (plan.steps, len(plan.full_steps)) == (6, 2) and not Path("nowhere").exists()
    words = ["generate", "--config", recipe, "--forecaster", out, "--prompt", "a dog", "--out"]
    result = CliRunner().invoke(app, [str(word) for word in (*words, tmp_path / "pictures")])
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "pictures").glob("*.png"))
    words = ["generate", "--config", recipe, "--forecaster", "lesa-untrained", "--full-steps", "2"]
    words += ["--prompt", "a dog", "--out", tmp_path / "untrained", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["num_inference_steps"] == 6


WRONG = [
    ({"heigth": 8}, "heigth is no key of a recipe, did you mean height; it takes pipeline,"),
    ({"height": "big"}, "height='big' is not a whole number; give one such as 8"),
    ({"height": True}, "height=True is not a whole number"),
    ({"guidance_scale": "high"}, "guidance-scale='high' is not a number"),
    ({"guidance_scale": float("nan")}, "guidance-scale=nan is not a number"),
    ({"full_steps": [3, "x"]}, "full-steps=[3, 'x'] is not a number of steps, or a list of them"),
    ({"dtype": 16}, "dtype=16 is not a text; put it in quotes"),
    ({"compile": "yes"}, "compile='yes' is not true or false"),
    ({"set": [4]}, "set=[4] is not a list of names and values"),
    ({"title": 3}, "title=3 is not a text"),
    ({"memory": {"offlod": "model"}}, "memory has no offlod, did you mean offload; it takes"),
    ({"memory": {"offload": "gpu"}}, "memory.offload='gpu': unknown; choose from none, model, se"),
    ({"memory": {"device": "much"}}, "memory.device='much' is not a size of memory; give one such"),
    ({"lora": {"file": "x"}}, "lora has no source; give the folder or hub id"),
    ({"scheduler_config": {"shft": 3}}, "scheduler-config.shft=3: FlowMatchEuler", "mean shift"),
    ({"scheduler_config": {"shift": "abc"}}, "shift='abc': FlowMatch", "such as 1.0"),
    ({"scheduler_config": {"use_dynamic_shifting": "no"}}, "dynamic_shifting='no': Flow", "bool"),
    ({"scheduler_config": {"shift": -3}}, "scheduler-config.shift=-3: FlowMatch", "nothing below"),
    ({"lora": {"source": " "}}, "lora.source=' ' is not a name; give one, or leave it out"),
    ({"memory": {"device": "0GB"}}, "memory.device='0GB' is not a size of memory; give one such"),
    ({"out": ""}, "out='' is not a name; give one, or leave it out"),
    ({"pipeline": "a\0b"}, "pipeline='a\\x00b' is not a name"),
    ({"width": 1001}, "model: StableDiffusion3Pipeline cannot be run", "Width (1001) cannot be g"),
    ({"height": 0}, "height=0: below 1; give at least 1"),
    ({"height": 2**40}, "height=1099511627776: above 65536; give a smaller size"),
    ({"height": 2**16, "width": 2**16}, "height=65536, width=65536: more than 1073741824 pixels"),
    ({"device": "cudda"}, "device='cudda': unknown, did you mean cuda; give one of"),
    ({"attention_backend": "flosh"}, "attention-backend='flosh': unknown; choose from"),
    ({"model": {"pipeline": "FluxPipeline"}}, "model has no denoiser; give the name of"),
    ({"model": {"pipeline": "A", "denoiser": "B", "text": {"x": [0]}}}, "model.text={'x': [0]} is"),
    ({"model": {"pipeline": "FluxPipeline", "denoiser": "X"}}, "the one that is given is Stable"),
    ({"full_steps": [9]}, "full-steps=9: 9 of 6 steps is not"),
    ({"budget": 2.5}, "budget=2.5: 2 prompts need"),
    ({"form": "disca"}, "form='disca': a plan knows what continuous and table cost"),
    ({"memory": {"device": "0.01MB"}}, "do not fit into the 10 kB of memory.device; set off"),
    ({"prompts": "none.txt"}, "none.txt': the file does not exist"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: str(case[0])[:40])
def test_a_wrong_recipe_is_one_sentence(case, sd3, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_pipeline", None)
    values = {**sd3, "out": str(tmp_path / "out"), **case[0]}
    if "model" in case[0] and "scheduler" not in case[0]["model"]:
        values["model"] = case[0]["model"]
    line = told("train", "--config", written(tmp_path, **values), "--dry-run")
    for words in case[1:]:
        assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


WRONG_MODELS = [
    ({"config": {"num_layers": -1}}, "model.config.num_layers=-1: SD3Transformer2DModel takes not"),
    ({"config": {"num_layers": 1.5}}, "num_layers=1.5: SD3Transformer2DModel takes int values the"),
    ({"config": {"num_layers": 0}}, "model.config: SD3Transformer2DModel has no block with it; gi"),
    ({"config": {"num_layers": 10**6}}, "would have more than 100 modules with it; correct its n"),
    ({"config": {"num_layer": 3}}, "no such field, did you mean num_layers; it has sample_size"),
    ({"scheduler_config": {"shift": -1.0}}, "model.scheduler-config.shift=-1.0: FlowMatchEuler"),
    ({"parts_config": {"vea": {}}}, "model.parts-config.vea: parts has no vea; name its class"),
    ({"arguments": {"is_distiled": True}}, "model.arguments.is_distiled=True: StableDiffusion3P"),
    ({"denoisers": 0}, "model.denoisers=0 is not 1 or 2"),
    ({"other_parameters": -3}, "model.other-parameters=-3 is not a number of weights; give 0 or"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG_MODELS, ids=lambda case: str(case[0])[:40])
def test_a_model_that_cannot_be_is_one_sentence(case, sd3, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_pipeline", None)
    monkeypatch.setattr("lesa.cli.meta_run.MOST_MODULES", 100)
    model = dict(sd3["model"])
    for name, value in case[0].items():
        key = name.replace("_", "-")
        model[key] = {**model.get(key, {}), **value} if isinstance(value, dict) else value
    recipe = written(tmp_path, **{**sd3, "out": str(tmp_path / "out"), "model": model})
    line = told("train", "--config", recipe, "--dry-run")
    assert case[1] in line and f"config='{recipe}': " in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("flux.1-dev", ["--height", 1000], "height=1000: FluxPipeline takes multiples of 16; g"),
        ("sdxl", ["--width", 1001], "width=1001: StableDiffusionXLPipeline takes multiples of 8; "),
        ("wan2.1-t2v-1.3b", ["--frames", 80], "frames=80: WanPipeline takes multiples of 4 plus 1"),
    ],
)  # fmt: skip
def test_a_plan_refuses_the_sizes_that_its_pipeline_does(name, options, words, tmp_path):
    assert words in told("train", "--config", name, "--dry-run", "--out", tmp_path, *options)


def test_a_plan_whose_results_cannot_be_written(sd3, tmp_path):
    """A plan proves that its folder can be written, and leaves none."""
    recipe = written(tmp_path, **sd3)
    for out in (recipe, recipe / "inner"):
        line = told("train", "--config", recipe, "--dry-run", "--out", out)
        assert f"out='{out}': cannot write into the folder (" in line
    inner = tmp_path / "a" / "b"
    line = told(
        "train", "--config", recipe, "--dry-run", "--out", inner, "--json", recipe / "x.json"
    )
    assert "json='" in line and "cannot write into the folder (" in line
    words = ["train", "--config", str(recipe), "--dry-run", "--out", str(inner)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("height: 8\nheight: 16\n", "no YAML (the key height is there twice); give a YAML file"),
        ("batch-size: 1\nbatch_size: 2\n", "batch_size is there twice, once with a hyphen"),
        ("- 1\n", "not a list of keys and values"),
        ("a: [1\n", "no YAML (line 2: "),
        ("x: !!python/object/apply:os.system [ls]\n", "no YAML (line 1: could not determine a con"),
        ("1: 2\n", "not a list of keys and values"),
    ],
)
def test_a_file_that_is_no_recipe(text, words, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    assert words in told("train", "--config", file, "--dry-run")


def test_what_is_no_file_is_told():
    assert "did you mean flux.1-dev" in told("train", "--config", "flux.1-dv", "--out", "x")
    line = told("train", "testbed", "--step-seconds", 3, "--prompts", "lesa:2", "--out", "x")
    assert line.endswith("step-seconds=3: it is for a plan; give --dry-run too")


def test_more_memory_than_there_is_is_told_before_loading(sd3, tmp_path, monkeypatch):
    import psutil

    monkeypatch.setattr(inputs, "load_pipeline", None)
    there = psutil.virtual_memory()._replace(total=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    line = told("train", "--config", written(tmp_path, out=str(tmp_path / "out"), **sd3))
    assert "do not fit into the 10 kB of cpu; " in line and "offload" not in line


class Placed:
    """A pipeline that writes down what is switched on."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.vae = self

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("enable_") and name != "to":
            raise AttributeError(name)
        return lambda *args, **kwargs: self.calls.append((name, *args, *kwargs.values())) or self


def test_memory_measures_are_diffusers_own():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    memory = Preparation("config", offload="model", vae_tiling=True)
    pipe = Placed()
    assert memory.place(pipe, cuda) is pipe
    assert pipe.calls == [("enable_tiling",), ("enable_model_cpu_offload", cuda)]
    pipe = Placed()
    memory.place(pipe, cpu)
    assert pipe.calls == [("enable_tiling",), ("to", cpu)]
    pipe.vae = None
    with pytest.raises(LesaError, match="memory.vae-tiling: NoneType has no enable_tiling; leave"):
        memory.place(pipe, cpu)


def test_an_adapter_is_fused_and_the_scheduler_changed(tmp_path):
    """The weights are the plain ones plus scale B A, and nothing of the adapter is left."""
    pipe, _ = build("flux")
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    before = weight.detach().clone()
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    name = "transformer.transformer_blocks.0.attn.to_q.lora_{}.weight"
    save_file({name.format("A"): down, name.format("B"): up}, tmp_path / "lora.safetensors")
    lora = {"source": str(tmp_path), "file": "lora.safetensors", "scale": 0.5}
    ready = Preparation("config", lora=lora, scheduler_config={"shift": 7.0})
    ready.place(pipe, torch.device("cpu"))
    ready.set_scheduler(pipe)
    after = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    torch.testing.assert_close(after, before + 0.5 * up @ down)
    assert not [n for n, _ in pipe.transformer.named_parameters() if "lora" in n]
    assert pipe.scheduler.config.shift == 7.0
    with pytest.raises(LesaError, match="lora.source='nowhere/x': FluxPipeline cannot have it"):
        Preparation("config", lora={"source": "nowhere/x"}).place(pipe, torch.device("cpu"))


def test_the_recipe_of_the_page_can_be_read(tmp_path):
    (block,) = (b for b in blocks_of(ROOT / "docs" / "recipes.md") if b.language == "yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(block.text)
    assert read_recipe(file).options["full_steps"] == "13,10,8"
