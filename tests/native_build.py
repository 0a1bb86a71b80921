"""The compiled kernels of csrc/ for tests and benchmarks that need them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lesa.ops import backend, native

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def native_kernels(request: pytest.FixtureRequest) -> None:
    """The library of csrc/cpu as loaded already, or built once into pytest's cache."""
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if native.load("cpu"):
        library, newest = native.library("cpu"), max(path.stat().st_mtime for path in sources)
        if library.exists() and library.stat().st_mtime < newest:  # else it is that of the cache
            pytest.fail(f"{library} is older than csrc/: build it again")
        return
    content = b"".join(path.read_bytes() for path in (ROOT / "setup.py", *sources))
    digest = hashlib.sha256(content + torch.__version__.encode()).hexdigest()[:16]
    folder = request.config.cache.mkdir("lesa_native") / digest
    if not (folder / "lesa" / "_native_cpu.so").exists():
        _build(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESA_NATIVE_DIR", str(folder / "lesa"))
        native.why_not.cache_clear()
        assert not native.why_not("cpu")
    backend.why_not.cache_clear()
    backend._active.cache_clear()


def _build(folder: Path) -> None:
    """Into `folder`, which appears complete or not at all."""
    begun = folder.with_suffix(f".{os.getpid()}")
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={begun}"]
    done = subprocess.run(
        [*command, f"--build-temp={begun / 'objects'}"],
        cwd=ROOT,
        env={**os.environ, "LESA_BUILD_EXT": "1", "NVCC": "not-here"},
        capture_output=True,
        text=True,
    )
    if "LESA_BUILD_EXT is 1, but" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    shutil.rmtree(begun / "objects")
    begun.replace(folder)
