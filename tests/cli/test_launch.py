"""`lesa generate` in several processes, as torchrun and `accelerate launch` start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lesa import testbed
from lesa.cli import app, make_pictures
from lesa.cli.launch import require_shared
from lesa.cli.manifest import MANIFEST, Made, Manifest
from lesa.errors import LesaError
from lesa.util.ranks import Launched, Ranks, launched

ROOT = Path(__file__).parents[2]
STEPS = ("--num-inference-steps", 4, "--batch-size", 2)
CACHE = ("--forecaster", "taylor-1", "--interval", 2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.txt"
    file.write_text("\n".join(testbed.captions(7, seed=2)))
    return file


def invoke(*args: object) -> dict[str, object]:
    """What one process says of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several has
    try:
        result = CliRunner().invoke(app, [str(arg) for arg in (*args, "--json")])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def alone(prompts, tmp_path_factory) -> Path:
    """The pictures of one process."""
    out = tmp_path_factory.mktemp("alone")
    invoke("generate", "flux", "--prompts", prompts, "--out", out, *STEPS, *CACHE)
    return out


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]


def check_like_alone(out: Path, alone: Path) -> None:
    """The same files with the same pixels, in the same order, and nothing beside them."""
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    for path in sorted(alone.glob("*.png")):
        assert Image.open(path).tobytes() == Image.open(out / path.name).tobytes(), path.name
    for mine, theirs in zip(lines(out), lines(alone), strict=True):
        for name in ("prompt", "file", "seed", "full_steps", "run"):
            assert mine[name] == theirs[name]


def test_one_process_notes_what_it_makes_and_makes_nothing_twice(alone, prompts):
    texts = prompts.read_text().splitlines()
    made = lines(alone)
    assert [line["prompt"] for line in made] == texts
    assert [line["seed"] for line in made] == [*range(7)]
    assert {line["full_steps"] for line in made} == {2} and {line["rank"] for line in made} == {0}
    assert all((alone / line["file"]).is_file() and line["seconds"] > 0 for line in made)
    first = alone / made[0]["file"]
    before = first.stat().st_mtime_ns
    (alone / made[2]["file"]).unlink()
    options = ("--prompts", prompts, "--out", alone, *STEPS, *CACHE)
    told = invoke("generate", "flux", *options)
    assert told["made"] == 2 and len(told["files"]) == 7  # the batch of the lost one
    assert first.stat().st_mtime_ns == before


@processes.needs_fork
def test_two_processes_make_what_one_makes(alone, prompts, tmp_path):
    out, facts = tmp_path / "out", tmp_path / "facts.json"
    options = ("--prompts", prompts, "--out", out, "--json", facts, *STEPS, *CACHE)
    ended = processes.launch(2, processes.command("generate", "flux", *options), tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "generate:" in ended[0][1] and ended[1][1] == ""  # the first one speaks
    check_like_alone(out, alone)
    assert [line["rank"] for line in lines(out)] == [0, 0, 1, 1, 0, 0, 1]
    told = json.loads(facts.read_text())
    assert told["made"] == 7 and len(told["files"]) == 7


@processes.needs_fork
def test_a_rank_that_dies_loses_its_batch_in_flight_only(alone, prompts, tmp_path, monkeypatch):
    out, make = tmp_path / "out", make_pictures._make
    options = ("generate", "flux", "--prompts", prompts, "--out", out, *STEPS, *CACHE)

    def dies(pipe, batch, *more):
        if os.environ.get("RANK") == "1" and batch[0][2] == 6:
            os._exit(9)  # as a kill does, in its second batch
        return make(pipe, batch, *more)

    monkeypatch.setattr(make_pictures, "_make", dies)
    first, second = processes.launch(2, processes.command(*options), tmp_path)
    assert second[0] == 9 and first[0] == 2
    assert "rank 0: another of 2 processes has ended" in first[1]
    assert len(list(out.glob("*.png"))) == 6 and not (out / MANIFEST).exists()
    told = invoke(*options)
    assert told["made"] == 1
    check_like_alone(out, alone)
    assert [line["rank"] for line in lines(out)] == [0, 0, 1, 1, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_four_processes_of_a_launcher(launcher, alone, prompts, tmp_path):
    start = {
        "torchrun": ("torch.distributed.run", "--nproc_per_node", 4),
        "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", 4,
                       "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"),
    }[launcher]  # fmt: skip
    args = ("generate", "flux", "--prompts", prompts, "--out", tmp_path / "out", *STEPS, *CACHE)
    done = subprocess.run(
        [*map(str, (sys.executable, "-m", *start, "-m", "lesa", *args))],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_like_alone(tmp_path / "out", alone)
    assert {line["rank"] for line in lines(tmp_path / "out")} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("told", "args", "words"),
    [
        (
            processes.environment(0, 4),
            ("generate", "flux", "--prompt", "a", "--prompt", "b", "--out", "OUT"),
            "WORLD_SIZE=4: 2 prompts at batch-size=8 are 1 batches, so that a process would have",
        ),
        (
            {"WORLD_SIZE": "2"},
            ("generate", "flux", "--prompt", "a", "--out", "OUT"),
            "RANK=None: no number of one of WORLD_SIZE=2 processes; start by torchrun",
        ),
        (
            processes.environment(0, 2) | {"RANK": "2"},
            ("generate", "flux", "--prompt", "a", "--out", "OUT"),
            "RANK=2: no number of one of WORLD_SIZE=2 processes",
        ),
        (
            {"WORLD_SIZE": "many"},
            ("generate", "flux", "--prompt", "a", "--out", "OUT"),
            "WORLD_SIZE=many: no number of one of",
        ),
        (
            processes.environment(0, 2),
            ("generate", "flux", "--prompt", "a", "--prompt", "b", "--out", "OUT",
             "--batch-size", "1", "--device", "cuda:1"),
            "device='cuda:1': all of WORLD_SIZE=2 processes would take it; give cuda",
        ),
        (
            processes.environment(0, 2),
            ("compare", "flux", "--prompts", "p.txt"),
            "WORLD_SIZE=2: lesa compare runs in one process",
        ),
        (
            processes.environment(0, 2),
            ("demo", "flux", "--out", "OUT"),
            "WORLD_SIZE=2: lesa demo runs in one process",
        ),
    ],
)  # fmt: skip
def test_a_launch_that_does_not_fit(told, args, words, tmp_path, monkeypatch):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    out = str(tmp_path / "out")
    result = CliRunner().invoke(app, [out if arg == "OUT" else arg for arg in args])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"lesa: {words}") and result.stderr.count("\n") == 1
    assert not os.path.exists(out)


def test_more_processes_than_gpus(monkeypatch):
    from lesa.cli.launch import check_ranks

    for name, value in processes.environment(0, 4).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(LesaError, match="4 processes on a machine with 2 GPUs; start at most 2"):
        check_ranks(8, 1, "cuda")
    check_ranks(8, 1, "cpu")


def test_of_one_machine_one_process_tells_what_all_meet(monkeypatch):
    for name, value in processes.environment(1, 4).items():
        monkeypatch.setenv(name, value)
    args = ("generate", "flux", "--prompt", "a", "--out", "never-made")
    result = CliRunner().invoke(app, [*args])
    assert result.exit_code == 2 and result.stderr == ""


def test_a_manifest_of_something_else_is_left_alone(tmp_path):
    text = '{"image": "a.png"}\n'
    (tmp_path / MANIFEST).write_text(text)
    result = CliRunner().invoke(app, ["generate", "flux", "--prompt", "a", "--out", str(tmp_path)])
    assert result.exit_code == 2 and (tmp_path / MANIFEST).read_text() == text
    assert f"line 1 of its {MANIFEST} is none of lesa generate's; move it away" in result.stderr


def test_lines_that_nobody_has_merged_and_one_that_is_torn(tmp_path):
    batch = [("0000-a", "a\u2028\udc80", 5), ("0001-b", "b", 6)]
    for stem, _, _ in batch:
        (tmp_path / f"{stem}.png").touch()
    torn = Manifest(tmp_path, "run", rank=3)
    torn.add(batch, ["0000-a.png", "0001-b.png"], 1.5, 2)
    (part,) = tmp_path.glob(".lesa-manifest/*")
    part.write_text(part.read_text()[:-4])
    assert Manifest(tmp_path, "run").finished(batch) == [True, False]
    assert Manifest(tmp_path, "other").finished(batch) == [False, False]
    Manifest(tmp_path, "run").merge()
    expected = Made("a\u2028\udc80", "0000-a.png", 5, 3, 1.5, 2, "run")
    assert Manifest(tmp_path).read() == {"0000-a.png": expected}
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".jsonl"}


def test_a_folder_that_not_all_machines_share(tmp_path):
    class Elsewhere(Ranks):
        def everyone(self, value):
            return [value, False]

        def told(self, value):
            return value

    with pytest.raises(LesaError, match="it is another folder for rank 1 of 2; give one that all"):
        require_shared(tmp_path, Elsewhere(size=2))
    assert not list(tmp_path.iterdir())
    require_shared(tmp_path, Ranks())


def test_what_launchers_say():
    assert launched({}) == launched({"WORLD_SIZE": "1", "RANK": "0"}) == Launched()
    assert launched(processes.environment(3, 4)) == Launched(3, 4, 3, 4)
    bare = {"WORLD_SIZE": "4", "RANK": "3"}
    assert launched(bare) == Launched(3, 4, 3, 4)
