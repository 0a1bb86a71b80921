"""Training by several processes: the statistics and coefficients of one, and mistakes told."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file
from training_jobs import STEPS, make
from typer.testing import CliRunner

import lesa
from lesa import testbed
from lesa.cli import app
from lesa.errors import LesaError
from lesa.training import Statistics
from lesa.training.numbers import check_ranks
from lesa.util.ranks import Ranks, joined

collect = importlib.import_module("lesa.training.collect")
PROMPTS = 5
# Two calls with a base run in a mapped file, guidance in one batch, and a tail behind the forecast.
CASES = {"qwen": "output", "sdxl": "output", "flux": "hidden"}
EXACT = 1e-9  # relative; the same batches by as many threads are the same to the last bit


def train(name: str, folder: Path, group: object = None, batch_size: int = 2) -> None:
    """Train on all batches of the prompts, of which two are held out, and save."""
    pipe, call = make(name, PROMPTS)
    options = {"form": "table", "tap": CASES[name], "batch_size": batch_size, "progress": False}
    forecaster = lesa.train(
        pipe, None, STEPS, (3, 2), call=call, folder=folder, group=group, validation=2, **options
    )
    forecaster.save_pretrained(folder)


def by_rank(folder: Path, names: list[str], **more: int) -> Callable[[int], None]:
    """Work of each rank: to train, and to save what it has found in a folder of its own."""

    def work(rank: int) -> None:
        with joined() as ranks:
            for name in names:
                train(name, folder / f"{name}-{rank}", ranks.group, **more)

    return work


def check_equal(found: Path, wanted: Path) -> None:
    """The same lists, coefficients and worth; but for the measured share of a skipped step."""
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    assert mine.keys() == theirs.keys() and any(name.startswith("rows.") for name in theirs)
    for name, rows in theirs.items():
        torch.testing.assert_close(mine[name], rows, rtol=EXACT, atol=EXACT)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (found, wanted)]
    for config in configs:
        del config["weights_sha256"]
        for entry in config["calibrated"]:
            del entry["worth"]["share"]
    assert configs[0] == configs[1]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several processes has
    yield
    torch.set_num_threads(threads)


@processes.needs_fork
def test_two_processes_find_what_one_finds(one_thread, tmp_path):
    for name in CASES:  # first: what is imported meanwhile, the others have
        train(name, tmp_path / name)
    ended = processes.launch(2, by_rank(tmp_path, [*CASES]), tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    for name in CASES:
        file = f"statistics-{STEPS}.safetensors"
        mine, theirs = (Statistics.load(tmp_path / f / file) for f in (f"{name}-0", name))
        assert mine.prompts == theirs.prompts and len(mine.joint) == PROMPTS
        torch.testing.assert_close(mine.joint, theirs.joint, rtol=1e-12, atol=1e-12)
        assert not (tmp_path / f"{name}-1" / file).exists()  # the first rank writes for all
        for rank in range(2):
            check_equal(tmp_path / f"{name}-{rank}", tmp_path / name)


@processes.needs_fork
def test_a_training_goes_on_after_a_rank_has_died(one_thread, tmp_path, monkeypatch):
    """The first rank keeps the statistics of every round of batches; any number may go on."""
    run, runs = collect._run_batch, []

    def dies(job, *more):
        if job.ranks.rank == 1 and len(runs) == 1:
            os._exit(9)  # as a kill does, in its second batch
        runs.append(more)
        return run(job, *more)

    train("qwen", tmp_path / "alone", batch_size=1)
    monkeypatch.setattr(collect, "_run_batch", dies)
    first, second = processes.launch(2, by_rank(tmp_path, ["qwen"], batch_size=1), tmp_path)
    assert second[0] == 9 and first[0] == 1 and "another of 2 processes has ended" in first[1]
    kept = tmp_path / "qwen-0" / f"statistics-{STEPS}.safetensors"
    assert Statistics.load(kept).prompts == ["embedding 0", "embedding 1"]
    monkeypatch.undo()
    train("qwen", tmp_path / "qwen-0", batch_size=1)
    check_equal(tmp_path / "qwen-0", tmp_path / "alone")


@processes.needs_fork
def test_what_ranks_exchange(tmp_path):
    def work(rank: int) -> None:
        with joined() as ranks:
            assert ranks.told(f"from {rank}") == "from 0"
            assert ranks.everyone(rank) == [0, 1] and ranks.share("abcde") == ("ace", "bd")[rank]
            for dtype in (torch.bfloat16, torch.float64, torch.int64):
                whole = torch.tensor(
                    [[-0.0, 1.5], [float("nan") if dtype.is_floating_point else 3, 7]]
                )
                whole = whole.to(dtype)
                parts = torch.zeros_like(whole)
                parts[rank] = whole[rank]
                found = ranks.assemble(parts).view(-1).view(torch.uint8)
                assert torch.equal(found, whole.view(-1).view(torch.uint8))
            mine = [torch.full((2,), 1.0 + rank), torch.ones(3)]
            ranks.same(mine)
            assert mine[0].tolist() == [1, 1]

    ended = processes.launch(2, work, tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.mark.slow
def test_four_processes_of_the_command(one_thread, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(testbed.captions(9, seed=2, split="train")))
    options = ("--prompts", prompts, "--num-inference-steps", 8, "--full-steps", 3)
    args = ("train", "flux", *options, "--batch-size", 2, "--out")
    result = CliRunner().invoke(app, [str(arg) for arg in (*args, tmp_path / "one")])
    assert result.exit_code == 0, result.output
    ended = processes.launch(4, processes.command(*args, tmp_path / "four"), tmp_path)
    assert [code for code, _ in ended] == [0] * 4, ended
    assert "collect:" in ended[0][1] and not any(text for _, text in ended[1:])
    check_equal(tmp_path / "four", tmp_path / "one")


def test_a_number_of_ranks_that_does_not_fit():
    check_ranks(Ranks(), 1, 8, "disca")
    check_ranks(Ranks(0, 4), 25, 8, "table")
    words = "group=4 ranks: 9 prompts at batch_size=8 are 2 batches, so that a rank would have none"
    with pytest.raises(LesaError, match=f"{words}; give at most 2 ranks, or batch_size=2"):
        check_ranks(Ranks(0, 4), 9, 8, "table")
    with pytest.raises(LesaError, match="group=2 ranks: form='disca' is trained by one process"):
        check_ranks(Ranks(0, 2), 9, 1, "disca")
    pipe, call = make("flux", 2)
    with pytest.raises(LesaError, match="group=str: no process group that this process belongs to"):
        lesa.train(pipe, None, STEPS, 3, call=call, group="world", validation=0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "WORLD_SIZE=2: 2 prompts at batch-size=8 are 1 batches, so that a process would have"),
        (("--batch-size", "1", "--form", "disca"), "WORLD_SIZE=2: lesa train --form disca runs in"),
    ],
)
def test_a_launch_that_does_not_fit(more, words, tmp_path, monkeypatch):
    for name, value in processes.environment(0, 2).items():
        monkeypatch.setenv(name, value)
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("a\nb\n")
    args = ("train", "flux", "--prompts", str(prompts), "--out", str(out), *more)
    result = CliRunner().invoke(app, [*args])
    assert result.exit_code == 2 and result.stderr.startswith(f"lesa: {words}")
    assert not out.exists()
