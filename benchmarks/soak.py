"""What holds over hours: random requests, threads, forks, killed trainings, changed files.

    python benchmarks/soak.py --requests 1000
    python benchmarks/soak.py --parts kill files --changes 2000

soak: random requests on pipelines that stay enabled, each picture compared bit for bit with the
same request on copies with no past; the slope of memory. threads: generations at once on one
denoiser, against one thread's. forks: processes forked among running threads. kill: `lesa train`
killed with SIGKILL until it ends, against a run that nobody disturbs, and forecasters saved over
one another. files: changed forecasters and statistics, which work or are refused in one sentence.

Ends with status 1 where anything differs. benchmarks/results/soak.json is written anew after each
part, and keeps the parts that are not asked for. The short forms are tests/scenarios/test_soak.py,
test_threads.py and test_kill.py, and tests/training/test_changed_files.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import fuzzed_folders  # noqa: E402
import soak_kills  # noqa: E402
import soak_threads  # noqa: E402
import torch  # noqa: E402
from _environment import RESULTS, environment, write  # noqa: E402
from saved_pipelines import save  # noqa: E402
from soak_run import soak  # noqa: E402

from lesa import testbed  # noqa: E402

Part = Callable[[argparse.Namespace, Path], dict[str, Any]]


def requests(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Random requests one after another, and memory."""
    found = soak(options.requests, options.seed, seconds=options.seconds, told=tell)
    return found.to_dict() | {"faults": found.differ}


def threads(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Four threads at a time."""
    found = soak_threads.threads(4, 4, options.rounds, options.seed)
    return found | {"faults": found["differ"]}


def forks(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A child among two running threads."""
    found = soak_threads.forks(2 * options.rounds, options.seed)
    return found | {"faults": [how for how in found["ended"] if how != "equal"]}


def kill(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trainings of the embedded FLUX and of a small SD3 with batched guidance, and savings."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(testbed.captions(4, split="train")))
    small = ["--num-inference-steps", "6", "--full-steps", "3", "--batch-size", "2"]
    given = ["--prompts", str(prompts), *small]
    given += ["--form", "table"]
    sd3 = ["train", str(folder / "sd3"), *save("sd3", folder / "sd3"), *given]
    flux = ["train", "testbed", *given, "--height", "32", "--width", "32", "--polish", "0"]
    runs, rounds = soak_kills.trainings, options.rounds // 2
    found: dict[str, Any] = {
        "trainings of sd3": runs(sd3, folder / "killed sd3", rounds, options.seed),
        "trainings of flux": runs(flux, folder / "killed flux", rounds // 2, options.seed),
        "savings": soak_kills.savings(folder / "saved", 10 * options.rounds, options.seed),
    }
    faults = [text for part in found.values() for text in part["not whole"]]
    trained = [found[name] for name in found if name != "savings"]
    faults += ["other weights"] * sum(part.get("other weights", 0) for part in trained)
    return found | {"faults": faults}


def files(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One changed file at a time, of a forecaster that was trained and of one with every part."""
    found: dict[str, Any] = {}
    for make in (fuzzed_folders.trained, fuzzed_folders.full):
        place = folder / make.__name__
        place.mkdir()
        found[make.__name__] = make(place).run(options.changes, options.seed, tell).to_dict()
    faults = [{"folder": made} | fault for made in found for fault in found[made].pop("faults")]
    return found | {"faults": faults}


PARTS: dict[str, Part] = {
    "soak": requests,
    "threads": threads,
    "forks": forks,
    "kill": kill,
    "files": files,
}


def tell(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--requests", type=int, default=1000, help="of the soak")
    parser.add_argument("--seconds", type=float, default=3600.0, help="limit of the soak")
    parser.add_argument("--rounds", type=int, default=20, help="of threads, forks and kill")
    parser.add_argument("--changes", type=int, default=2000, help="of either folder of files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # reasons of full steps, which are counted
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.parts:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[name](options, Path(folder))
        seconds = round(time.monotonic() - begun)
        known[name] = {
            "environment": environment(),
            "seed": options.seed,
            "seconds": seconds,
        } | found
        write(options.out, known)
        tell(f"{name}: {len(found['faults'])} faults, {seconds} s")
    if any(known[name]["faults"] for name in options.parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
