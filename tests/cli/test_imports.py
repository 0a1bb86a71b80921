"""What a command loads: measuring is for those that measure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lesa import testbed

PROGRAM = """
import json, sys
from lesa.cli import app
app(sys.argv[1:], standalone_mode=False)
print(json.dumps([name for name in sys.modules if name.startswith("lesa.")]))
"""


def loaded_by(*args: object) -> set[str]:
    """Modules of lesa in a fresh interpreter after a command."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, args)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_train_and_generate_load_nothing_of_evaluation(tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "forecaster"
    prompts.write_text(testbed.captions(1, seed=1, split="train")[0])
    common = ("testbed", "--prompts", prompts, "--num-inference-steps", 8, "--full-steps", 4)
    trained = loaded_by("train", *common, "--polish", 0, "--out", out)
    assert "lesa.training.train" in trained
    for number, forecaster in enumerate((out, "taylor-1")):
        pictures = tmp_path / f"pictures{number}"
        made = loaded_by("generate", *common, "--forecaster", forecaster, "--out", pictures)
        assert "lesa.engine.controller" in made and len(list(pictures.glob("*.png"))) == 1
        trained |= made
    assert not [name for name in trained if name.startswith("lesa.evaluation")]


def test_help_and_version_load_no_torch():
    """Of what a user waits for before he has decided anything."""
    program = (
        "import sys\n"
        "from lesa.cli import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "print([name for name in ('torch', 'diffusers', 'numpy') if name in sys.modules])"
    )
    for words in (["--help"], ["--version"], ["generate", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
