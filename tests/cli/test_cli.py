"""The commands as a user runs them, on the embedded pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lesa import LesaForecaster, Schedule, testbed
from lesa.cli import app
from lesa.cli.calls import call_settings
from lesa.cli.inputs import embedded_name
from lesa.cli.run_compare import one_line
from lesa.cli.saved import look_at
from lesa.errors import LesaError
from lesa.evaluation import methods
from lesa.evaluation.method import Bench, Method

STEPS = ("--num-inference-steps", "8")
COMMANDS = ("demo", "train", "generate", "compare", "play", "inspect", "env")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(testbed.captions(3, seed=9)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A forecaster for 3 of 8 full steps, made by the command itself."""
    folder = tmp_path_factory.mktemp("trained")
    texts = folder / "calibration.txt"
    texts.write_text("\n".join(testbed.captions(2, seed=1, split="train")))
    out = folder / "forecaster"
    run("train", "testbed", "--prompts", texts, *STEPS, "--full-steps", "3", "--out", out)
    return out


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def run(*args) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args) -> str:
    """The one line that bad input gets, with exit status 2 and nothing on standard output."""
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    *before, line = result.stderr.splitlines()
    assert all(re.fullmatch(r"load: [\d.]+ s", phase) for phase in before), result.stderr
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(command):
    text = run(command, "--help")
    assert f"Example: lesa {command}" in text
    assert "--json" in text


def test_json_alone_goes_to_stdout_and_text_to_stderr(trained):
    """Also in front of an argument, which is not taken for a file."""
    result = invoke("inspect", "--json", trained)
    assert json.loads(result.stdout)["name"] == "lesa"
    assert "steps in full" in result.stderr


def test_env_prints_versions_for_people_and_for_programs(tmp_path):
    assert "torch" in run("env")
    facts = json.loads(run("env", "--json"))
    assert {"lesa", "python", "torch", "diffusers", "devices", "backend"} <= set(facts)
    path = tmp_path / "env.json"
    run("env", "--json", path)
    assert json.loads(path.read_text()) == facts


@pytest.mark.parametrize("kind", ["untimed", "default", "tuned"])
def test_env_tells_how_the_kernels_are_configured(kind, tmp_path, monkeypatch):
    """A family that is shipped, a device of none, and one that the user has timed."""
    name = "NVIDIA L20" if kind == "untimed" else "Unheard-of GPU"
    if kind == "tuned":
        shape = {"size": 64, "columns": 64, "history": 3, "itemsize": 2}
        entry = {"shape": shape, "config": {}, "milliseconds": 0.1}
        file = tmp_path / "unheard-of-gpu.json"
        file.write_text(json.dumps({"kernels": {"mix": [entry]}}))
        monkeypatch.setenv("LESA_KERNEL_CONFIGS", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    text = " ".join(run("env").split())
    assert f"kernel configs {name}: {kind}: " in text
    assert ("python -m lesa_kernels.tune" in text) == (kind != "tuned")


def test_train_writes_a_folder_that_inspect_reads(trained, tmp_path):
    assert {"model.safetensors", "config.json"} <= {path.name for path in trained.iterdir()}
    text = run("inspect", trained, "--picture", tmp_path)
    assert "3 of 8 steps in full" in text and "FluxTransformer2DModel" in text
    assert Image.open(tmp_path / "table-3-of-8-cond.png").width > 200
    facts = json.loads(run("inspect", trained, "--json"))
    (entry,) = facts["calibrated"]
    assert len(entry["full_steps"]) == 3 and len(entry["tables"]["cond"]) == 8


def test_inspect_shows_the_tables_of_guidance_parts(tmp_path):
    forecaster = LesaForecaster("table", uses_latent=False)
    rows = torch.zeros(4, 3)
    rows[[1, 3], 0] = 1
    schedule, sigmas = Schedule.explicit((0, 2), 4), (1.0, 0.7, 0.5, 0.3, 0.0)
    forecaster.correct(schedule, sigmas, "cond", rows, split=torch.stack([rows, 2 * rows], -1))
    forecaster.save_pretrained(tmp_path)
    assert "cond part 2" in run("inspect", tmp_path, "--picture", tmp_path)
    tables = json.loads(run("inspect", tmp_path, "--json"))["calibrated"][0]["tables"]
    assert list(tables) == ["cond", "cond part 1", "cond part 2"]
    assert tables["cond part 2"] == (2 * rows).tolist()
    assert (tmp_path / "table-2-of-4-cond-part-2.png").exists()


def test_train_hands_its_options_on(prompts, tmp_path, monkeypatch):
    def stop(*_, **given):
        raise LesaError(f"{given['polish']} {given['form']} {given['full_steps']}")

    monkeypatch.setattr("lesa.train", stop)
    options = ("--prompts", prompts, *STEPS, "--full-steps", "3", "--form", "table")
    told = refused("train", "testbed", *options, "--polish", "0", "--out", tmp_path)
    assert told == "lesa: 0 table (3,)"
    few = ("--prompts", prompts, "--num-inference-steps", "20", "--out", tmp_path)
    assert refused("train", "testbed", *few).endswith("continuous (13, 10, 8)")
    assert refused("train", "testbed", *few, "--form", "paper").endswith("paper (10,)")
    schnell = ("train", "schnell", "--prompts", prompts, "--out", tmp_path)  # 4 steps
    assert refused(*schnell).endswith("continuous (2, 1)")
    assert refused(*schnell, "--form", "paper").endswith("paper (2,)")
    assert refused(*schnell, "--form", "disca").endswith("disca (2,)")


@pytest.mark.parametrize(
    "cache",
    [(), ("--forecaster", "taylor-1", "--interval", "3"), ("--forecaster", "TRAINED")],
)
def test_generate_saves_a_picture_for_each_prompt(cache, trained, prompts, tmp_path):
    if "TRAINED" in cache:
        cache = ("--forecaster", trained, "--full-steps", "3")
    out, facts = tmp_path / "out", tmp_path / "facts.json"
    options = ("--prompts", prompts, "--prompt", "a red circle", "--out", out, "--json", facts)
    args = ("generate", "testbed", *options, *cache, *STEPS, "--batch-size", "3")
    phases = [line.partition(":")[0] for line in invoke(*args).stderr.splitlines()]
    assert phases == ["load", "generate"]
    told = json.loads(facts.read_text())
    assert sorted(told["files"]) == sorted(str(path) for path in out.glob("*.png"))
    assert len(told["files"]) == 4 and Image.open(told["files"][0]).size == (64, 64)
    if cache:
        assert told["stats"]["skipped"] > 0 and not told["stats"]["fallbacks"]


def test_compare_writes_rows_and_a_report(trained, prompts, tmp_path):
    options = ("--pipeline", "testbed", "--prompts", prompts, *STEPS, "--full-steps", "3,4")
    contest = ("--methods", "taylor-1,lesa", "--forecaster", trained, "--report", tmp_path)
    contest += ("--judge", "attributes")
    told = json.loads(run("compare", *options, *contest, "--json"))
    rows = told["rows"]
    assert told["settings"]["num_inference_steps"] == 8 and len(told["prompts"]) == 3
    found = [(row["method"], row["full_steps"]) for row in rows]
    assert found == [("taylor-1", 3), ("lesa", 3), ("taylor-1", 4), ("lesa", 4)]
    assert rows[1]["schedule"].startswith("searched: 0,")
    assert set(rows[1]["scores"]) == {"shape", "colour", "place"}
    assert (tmp_path / "report.html").exists()


class Curious:
    """A peer that writes down what it is prepared on; it runs the whole model."""

    takes_lists = False
    benches: list[Bench] = []

    def unfit(self, bench: Bench) -> str | None:
        return None

    def build(self, name, wanted, bench, searched) -> Method:
        self.benches.append(bench)
        return Method(name, wanted)


@pytest.fixture
def curious(monkeypatch) -> list[Bench]:
    """The benches that the only two methods, "curious" and lesa, are prepared on."""
    monkeypatch.setattr(methods, "PEERS", {"curious": Curious()})
    monkeypatch.setattr(methods, "NAMES", ("curious", "lesa"))
    monkeypatch.setattr(Curious, "benches", [])
    return Curious.benches


def test_compare_prepares_peers_on_other_prompts_than_the_measured_ones(curious, tmp_path):
    """A file's; without one, captions that an embedded pipeline was trained on."""
    own = testbed.prompts("schnell", 8, seed=0, split="train")
    measured, others = tmp_path / "p.txt", tmp_path / "c.txt"
    measured.write_text(own[2])
    others.write_text("a\nb\n")
    options = ("compare", "--pipeline", "testbed:schnell", "--prompts", measured, "--full-steps")
    told = json.loads(run(*options, "2", "--json", "--seed", "5"))
    assert told["settings"]["num_inference_steps"] == 4  # its own
    run(*options, "1", "--calibration", others)
    first, second = curious
    assert list(first.calibration) == own[:2] + own[3:]
    assert list(second.calibration) == ["a", "b"]
    assert (first.num_steps, first.seed) == (4, 5) and first.pipe is not None


def test_compare_all_tells_what_it_leaves_out(curious, prompts):
    options = ("--pipeline", "schnell", "--prompts", prompts, "--full-steps", "1")
    result = invoke("compare", *options, "--json")
    line = "1 method does not apply: lesa (needs a trained forecaster; give forecaster=FOLDER)"
    told = json.loads(result.stdout)
    assert line in told["notes"] and list(told["left_out"]) == ["lesa"]
    assert line in result.stderr.splitlines()
    told = json.loads(run("compare", *options, "--methods", "curious", "--json"))
    assert not any("not apply" in note for note in told["notes"]) and told["left_out"] == {}


def test_what_is_left_out_shares_a_line():
    reasons = {"a": "needs a U-Net", "b": "needs scipy", "c": "needs a U-Net; leave it out"}
    (line,) = one_line(reasons)
    assert line == "3 methods do not apply: a, c (needs a U-Net); b (needs scipy)"
    assert one_line({}) == []


def test_flops_only_needs_neither_pipeline_nor_prompts(tmp_path):
    options = ("compare", "--flops-only", "--model", "flux.1-dev", "--full-steps", "7")
    result = invoke(*options, "--num-inference-steps", "20", "--height", "512", "--json")
    plain, output, hidden = json.loads(result.stdout)
    assert plain["tokens"] == [2048, 512] and plain["full_steps"] == 20
    assert [output["tap"], hidden["tap"]] == ["output", "hidden"]
    assert output["full_steps"] == 7 and plain["paper_tflops"] is None
    assert "flux.1-dev: 2048 + 512 tokens, 20 steps" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give a pipeline and --prompts"),
        (("--pipeline", "testbed"), "give a pipeline and --prompts"),
        (("--flops-only",), "--flops-only and --model go together"),
        (("--model", "flux.1-dev"), "--flops-only and --model go together"),
        (("--flops-only", "--model", "flux.9"), "'flux.9': it has no published sizes"),
        (("--flops-only", "--model", "sdxl", "--full-steps", "60"), "60 of 50 steps"),
        (("--flops-only", "--model", "sdxl", "--frames", "5"), "model of pictures"),
    ],
)
def test_compare_of_what(options, words):
    assert words in refused("compare", *options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--methods", "fora,nonsense"),
            "methods='nonsense': unknown; choose from all, fewer",
        ),
        (("--methods", ","), "methods=',': none given"),
        (("--methods", "fora,lesa"), "'lesa': it needs a trained forecaster"),
        (("--calibration", "SAME"), "3 of its prompts are measured too, e.g."),
        (("--judge", "beauty"), "judge='beauty': unknown; choose attributes, image-reward or"),
        (("--calibration", "nowhere.txt"), "'nowhere.txt': the file does not exist"),
        (("--pipeline", "testbed:nope"), "pipeline='nope': not embedded; choose from flux"),
    ],
)
def test_compare_refuses_before_a_pipeline_is_loaded(options, words, prompts, monkeypatch):
    monkeypatch.setattr(
        "lesa.cli.inputs.load_pipeline", lambda *_, **__: pytest.fail("work was begun")
    )
    options = [prompts if option == "SAME" else option for option in options]
    named = () if "--pipeline" in options else ("--pipeline", "testbed")
    line = refused("compare", *named, "--prompts", prompts, *options)
    assert words in line


def test_frames_of_a_picture(prompts):
    common = ("compare", "--pipeline", "testbed", "--prompts", prompts)
    assert "FluxPipeline makes no video" in refused(*common, "--frames", "9")


@pytest.mark.parametrize("name", ["testbed", "testbed:flux", "flux"])
def test_one_way_to_name_an_embedded_pipeline(name):
    assert embedded_name(name) == "flux"
    assert call_settings(look_at(name), {}) == testbed.settings("flux")
    assert embedded_name(f"./{name}") is None


def test_demo_at_a_small_size_shows_what_was_gained(tmp_path, monkeypatch):
    """The demo's own size takes minutes: here 8 steps, 3 in full, 2 prompts."""
    settings = {**testbed.settings("flux"), "num_inference_steps": 8}
    monkeypatch.setattr(testbed, "settings", lambda name: settings)
    monkeypatch.setattr("lesa.cli.run_demo.UNSEEN", 2)
    names = ("fewer-steps", "taylor-1", "deepcache", "lesa")  # DeepCache: no U-Net, no package
    monkeypatch.setattr("lesa.cli.run_demo.contest", lambda pipe, steps: ((3,), names))
    out, facts = tmp_path / "lesa-demo", tmp_path / "facts.json"
    text = run("demo", "--out", out, "--prompts-count", "2", "--json", facts)
    assert "deepcache is left out: it " in text
    names = {"grid.png", "worst-3.png", "paired.png", "report.html", "report.json", "forecaster"}
    assert names < {path.name for path in out.iterdir()}
    table = text.splitlines()[-8:]  # the last lines are the table
    for name in ("plain", "fewer-steps", "taylor-1", "lesa"):
        assert any(line.split()[:1] == [name] for line in table), text
    told = json.loads(facts.read_text())
    assert told["rows"] == json.loads((out / "report.json").read_text())["rows"]
    assert set(testbed.captions(2, seed=0, split="train")).isdisjoint(told["prompts"])


BAD_PROMPTS = {
    "missing": (None, "does not exist"),
    "empty": (b"\n  \n", "holds no prompt"),
    "binary": (b"\xff\xfe\x00\x81", "cannot read"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
@pytest.mark.parametrize("command", ["train", "generate", "compare"])
def test_prompt_file(command, case, tmp_path):
    content, words = BAD_PROMPTS[case]
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    pipeline = ("--pipeline", "testbed") if command == "compare" else ("testbed",)
    out = () if command == "compare" else ("--out", tmp_path / "out")
    line = refused(command, *pipeline, "--prompts", path, *out)
    assert line.startswith("lesa: prompts=") and words in line and "one prompt per line" in line
    assert not (tmp_path / "out").exists()


def test_generate_without_any_prompt(tmp_path):
    assert "prompts=None: none given" in refused("generate", "testbed", "--out", tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--full-steps", "60"), "60 of 50 steps"),
        (("--full-steps", "0"), "0 of 50 steps"),
        (("--full-steps", "9", *STEPS), "9 of 8 steps"),
        (("--interval", "0"), "interval=0"),
        ((), "either --full-steps or --interval"),
        (("--full-steps", "10", "--interval", "7"), "either --full-steps or --interval"),
    ],
)
def test_which_steps_are_full(options, words, prompts, tmp_path):
    line = refused(
        "generate",
        "testbed",
        "--forecaster",
        "fora",
        "--prompts",
        prompts,
        "--out",
        tmp_path,
        *options,
    )
    assert words in line


@pytest.mark.parametrize("text", ["60", "ten", "", "10,0"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_full_steps_lists(command, text, prompts, tmp_path):
    place = ("testbed", "--out", tmp_path) if command == "train" else ("--pipeline", "testbed")
    line = refused(command, *place, "--prompts", prompts, "--full-steps", text)
    assert line.startswith("lesa: full-steps=")


def test_unwritable_folders_are_refused_before_any_work(prompts, tmp_path, monkeypatch):
    """A file stands where the folder should be: also root cannot write there."""
    monkeypatch.setattr(
        "lesa.cli.inputs.load_pipeline", lambda *_, **__: pytest.fail("work was begun")
    )
    blocked = tmp_path / "file" / "out"
    blocked.parent.write_text("")
    for line in (
        refused("train", "testbed", "--prompts", prompts, "--out", blocked),
        refused("generate", "testbed", "--prompts", prompts, "--out", blocked),
        refused("demo", "--out", blocked),
    ):
        assert line.startswith(f"lesa: out={str(blocked)!r}: cannot write into the folder (")
        assert line.endswith("; give another folder")
    common = ("compare", "--pipeline", "testbed", "--prompts", prompts)
    assert f"report={str(blocked)!r}: cannot write" in refused(*common, "--report", blocked)
    assert "lesa: json=" in refused(*common, "--json", blocked / "rows.json")
    assert "is a folder" in refused(*common, "--json", tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (None, "cannot load"),
        ({"_class_name": "NoSuchPipeline"}, "NoSuchPipeline"),
        (
            {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]},
            "cannot load",
        ),
    ],
)
def test_pipelines_that_cannot_be_loaded(index, words, prompts, tmp_path):
    folder = tmp_path / "pipeline"
    folder.mkdir()
    if index is not None:
        (folder / "model_index.json").write_text(json.dumps(index))
    line = refused("generate", folder, "--prompts", prompts, "--out", tmp_path / "out")
    assert (
        line.startswith(f"lesa: pipeline={str(folder)!r}: ")
        and words in line
        and "save_pretrained" in line
    )


def test_a_pipeline_without_prompts(prompts, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(4,), norm_num_groups=1, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), in_channels=3,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    options = ("--prompts", prompts, "--out", tmp_path / "out")
    assert "DDPMPipeline takes no prompt" in refused("train", tmp_path / "ddpm", *options)


def test_device_and_dtype(prompts, tmp_path):
    common = ("generate", "testbed", "--prompts", prompts, "--out", tmp_path)
    assert "device='tpu0': unknown" in refused(*common, "--device", "tpu0")
    assert "device='meta': not usable here" in refused(*common, "--device", "meta")
    assert "dtype='int8': unknown" in refused("generate", tmp_path, *common[2:], "--dtype", "int8")


def test_a_truncated_checkpoint(trained, prompts, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((trained / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:500])
    for line in (
        refused("inspect", broken),
        refused("generate", "testbed", "--forecaster", broken, "--full-steps", "3",
                "--prompts", prompts, "--out", tmp_path / "out"),
    ):  # fmt: skip
        assert "model.safetensors" in line and "truncated" in line


def test_other_weights_are_served_with_a_warning(trained, prompts, tmp_path):
    """A fine-tuned model of the same class may do well with the same forecaster."""
    import torch

    pipe = testbed.load("flux")
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.01)
    pipe.save_pretrained(tmp_path / "other")
    result = invoke(
        "generate", tmp_path / "other", "--forecaster", trained, "--full-steps", "3", *STEPS,
        "--prompts", prompts, "--out", tmp_path / "out", "--height", "64", "--width", "64",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (told,) = [line for line in result.stderr.splitlines() if "other weights" in line]
    assert told.startswith("warning: ") and "UserWarning" not in result.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_a_checkpoint_of_another_model(trained, prompts, tmp_path):
    line = refused(
        "generate", "qwen", "--forecaster", trained, "--full-steps", "3", *STEPS,
        "--prompts", prompts, "--out", tmp_path / "out",
    )  # fmt: skip
    assert "was trained for" in line and "QwenImageTransformer2DModel" in line


def test_inspect_of_nothing(tmp_path):
    assert "config.json" in refused("inspect", tmp_path / "nowhere")
