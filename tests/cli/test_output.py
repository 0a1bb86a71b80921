"""What is printed: words of users as they are, no markup, no escape sequences; env on a screen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lesa import LesaForecaster, Schedule, __version__, testbed
from lesa.cli import app
from lesa.cli.environment import cuda_in_words, environment, environment_table
from lesa.cli.output import shown

COMMANDS = ("demo", "train", "generate", "compare", "play", "inspect", "env")


def invoke(*args: object, **more):
    return CliRunner().invoke(app, [str(arg) for arg in args], **more)


@pytest.fixture
def odd(tmp_path) -> Path:
    """A forecaster whose folder and metadata hold what rich and terminals would obey."""
    forecaster = LesaForecaster("table", uses_latent=False)
    forecaster.metadata = {
        "model_id": "a[/y]b\x1b[31m\x07",
        "call": {"height": 64, "negative_prompt": "[bold]"},
        "list": [1, "x"],
    }
    forecaster.recommend(Schedule.explicit((0, 2), 4), (1.0, 0.7, 0.5, 0.3, 0.0))
    folder = tmp_path / "x[/y]"
    forecaster.save_pretrained(folder)
    return folder


def test_inspect_prints_names_and_metadata_as_they_are(odd):
    result = invoke("inspect", odd, "--picture", odd / "[b]drawn")
    assert result.exit_code == 0, result.output
    assert "model_id: a[/y]b\\x1b[31m\\x07" in result.stdout and "\x1b" not in result.output
    assert "call: height=64, negative_prompt=[bold]" in result.stdout
    assert "list: 1, x" in result.stdout
    assert f"drawn: {odd}/[b]drawn/table-2-of-4-" in result.stdout


def test_generate_into_a_folder_with_brackets(tmp_path):
    out = tmp_path / "pics[/y]"
    options = ("--num-inference-steps", 2, "--out", out)
    result = invoke("generate", "flux", "--prompt", "[bold]a[/x]", *options)
    assert result.exit_code == 0, result.output
    assert f"1 picture in {out}, " in result.stdout
    assert {path.name for path in out.iterdir()} == {"0000-bold-a-x.png", "manifest.jsonl"}


def test_errors_hold_no_escape_sequences(tmp_path):
    result = invoke("generate", "flux", "--out", tmp_path, "--prompts", tmp_path / "\x1b[31m[/y]")
    assert result.exit_code == 2 and "\x1b" not in result.stderr and "[/y]" in result.stderr
    result = invoke("\x1b[31mgenerate")
    assert result.exit_code == 2 and "\x1b" not in result.stderr


def test_training_at_a_size_that_no_step_can_be_followed_at(tmp_path):
    """The default size of the embedded FLUX's class, once it is a folder: told with options before
    any step runs, and no folder is left that was not there."""
    testbed.load().save_pretrained(tmp_path / "own")
    (tmp_path / "p.txt").write_text("a red circle")
    (tmp_path / "there").mkdir()
    line = "train", tmp_path / "own", "--prompts", tmp_path / "p.txt", "--full-steps", 4
    for out in ("new/deep", "there"):
        result = invoke(*line, "--num-inference-steps", 20, "--out", tmp_path / out)
        told = result.stderr.splitlines()[-1]
        assert told.startswith("lesa: height=None, width=None: training cannot follow its steps, ")
        assert "1, 0: the shift of this size drives them to 1; pass --height 64 --width 64" in told
    assert (tmp_path / "there").is_dir() and not (tmp_path / "new").exists()


def test_what_a_terminal_would_obey_is_escaped():
    text = "a\tb\x1b[0m \ud83d \u202e 红 ü 🦊\n[/y]"
    assert shown(text) == "a\\tb\\x1b[0m \\ud83d \\u202e 红 ü 🦊\n[/y]"


def test_version():
    assert invoke("--version").stdout == f"lesa {__version__}\n"


def test_env_fits_on_one_screen_without_lists_of_python():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(environment_table(environment()))
    lines = console.export_text().splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80
    assert not any(mark in line for line in lines for mark in ("['", "']", "{'"))
    text = " ".join(" ".join(lines).split())
    for name in ("lesa", "Python", "torch 2.", "diffusers 0.", "CPU threads", "backend", "native"):
        assert name in text


def pretended(cuda, available=False, hip=None):
    version = SimpleNamespace(cuda=cuda, hip=hip)
    return SimpleNamespace(
        __version__="2.13.0+x",
        version=version,
        cuda=SimpleNamespace(is_available=lambda: available),
    )


@pytest.mark.parametrize(
    ("torch_", "driver", "hidden", "words"),
    [
        (pretended("13.0", True), True, None, "13.0"),
        (pretended(None), False, None, "none: torch 2.13.0+x is a CPU build"),
        (pretended(None), True, None, "a CPU build, but nvidia-smi is here; install a CUDA build"),
        (pretended("13.0"), False, None, "torch 2.13.0+x, but no CUDA device is visible: no NVI"),
        (pretended("13.0"), True, None, "see with nvidia-smi whether the driver serves CUDA 13.0"),
        (pretended("13.0"), True, "", "CUDA_VISIBLE_DEVICES='' hides them; unset it"),
        (pretended(None, hip="7.1"), False, None, "none; a build for ROCm 7.1"),
    ],
)
def test_env_explains_a_torch_that_does_not_fit_the_machine(
    torch_, driver, hidden, words, monkeypatch
):
    monkeypatch.setattr("lesa.cli.environment.shutil.which", lambda _: "/bin/x" if driver else None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert words in cuda_in_words(torch_)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_in_80_columns_with_whole_names(command):
    result = invoke(*command.split(), "--help", env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80 and "…" not in result.stdout
    assert "--pipeline " not in result.stdout  # the alias is hidden
    if command in ("train", "generate", "compare"):
        panels = [line.split()[1] for line in result.stdout.splitlines() if line[:1] == "╭"]
        assert set(panels) >= {"Arguments", "Prompts", "Forecaster", "Pipeline", "Output"}
        for name in ("--num-inference-steps", "--attention-backend", "--scheduler", "--set"):
            assert name in result.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lesa generate q", {"qwen"}),
        ("lesa train testbed:s", {"testbed:schnell", "testbed:sdxl"}),
        ("lesa generate flux --forecaster taylor-", {"taylor-0", "taylor-1", "taylor-2"}),
        ("lesa generate flux --scheduler d", {"ddim", "dpm++"}),
        ("lesa compare flux --methods fora,taylor-1,hic", {"fora,taylor-1,hicache"}),
        ("lesa train flux --form p", {"paper"}),
        ("lesa train flux --tap ", {"hidden", "output"}),
        ("lesa demo light", {"lightning"}),
        ("lesa gen", {"generate"}),
    ],
)
def test_the_shell_completes_names(line, expected):
    words = line.split(" ")
    variables = {
        "_LESA_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    result = CliRunner().invoke(app, [], prog_name="lesa", env=variables)
    assert set(result.stdout.split()) == expected


def test_show_completion_is_offered():
    assert "--show-completion" in invoke("--help").stdout


def test_json_of_a_folder_that_is_no_utf8(tmp_path):
    """A name in another encoding, as file systems may hold."""
    out = tmp_path / "a\udcff"
    options = ("--num-inference-steps", 2, "--out", out)
    result = invoke("generate", "flux", "--prompt", "a", *options, "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "f.json").read_text())["files"] == [str(out / "0000-a.png")]
