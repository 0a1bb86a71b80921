"""setup.py: what it builds, and what it says where it cannot. A stand-in compiler saves time."""

from __future__ import annotations

import importlib.util
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
ARCHS = ("80", "90a", "100")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the native part is for Linux")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkout with the least that a build needs."""
    copy = tmp_path / "source"
    for folder in ("csrc", "kernels", "lesa"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "testbed", "evaluation", "training")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for path in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / path, copy)
    return copy


@pytest.fixture
def torch_folder(tmp_path: Path) -> Path:
    """A torch with headers that raises when it is imported."""
    folder = tmp_path / "site" / "torch"
    header = folder / "include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (folder / "__init__.py").write_text("raise SystemExit('setup.py has imported torch')")
    return folder


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    return stand_in(tmp_path / "compiler")


def stand_in(script: Path) -> str:
    """A compiler that writes its command line where the library should be."""
    script.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    script.chmod(0o755)
    return str(script)


def setup(source: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("LESA_")}
    return subprocess.run(
        [sys.executable, *(arguments or ("setup.py", "build_ext", "--inplace"))],
        cwd=source,
        env={**kept, "NVCC": "not-here", **environment},
        capture_output=True,
        text=True,
    )


def backend(call: str) -> tuple[str, ...]:
    return "-c", f"from setuptools import build_meta as b; print(b.{call}('.'))"


@LINUX
@pytest.mark.parametrize(
    ("environment", "sentence"),
    (
        ({"CXX": "no-such-c++"}, "no C++ compiler 'no-such-c++' on PATH; install g++ or set CXX."),
        ({"LESA_TORCH_DIR": "/nowhere"}, "/nowhere has no stable-ABI headers; use torch 2.10"),
    ),
)
def test_what_is_missing_is_said_in_one_sentence(source, torch_folder, environment, sentence):
    environment = {"LESA_TORCH_DIR": str(torch_folder), **environment}
    asked = setup(source, LESA_BUILD_EXT="1", **environment)
    assert asked.returncode and f"LESA_BUILD_EXT is 1, but {sentence}" in asked.stderr
    assert "Traceback" not in asked.stderr
    default = setup(source, **environment)
    assert not default.returncode and f"without the native part: {sentence}" in default.stderr
    assert not list(source.rglob("*.so"))


@LINUX
def test_zero_builds_nothing(source, torch_folder, compiler):
    done = setup(source, LESA_BUILD_EXT="0", LESA_TORCH_DIR=str(torch_folder), CXX=compiler)
    assert not done.returncode and "LESA_BUILD_EXT is 0" in done.stderr
    assert not list(source.rglob("*.so"))


@LINUX
def test_a_compiler_that_fails_is_fatal_only_where_asked_for(source, torch_folder):
    broken = {"CXX": "false", "LESA_TORCH_DIR": str(torch_folder)}
    assert not setup(source, **broken).returncode
    asked = setup(source, LESA_BUILD_EXT="1", **broken)
    assert asked.returncode and "false ended with code 1" in asked.stderr
    assert not list(source.rglob("*.so"))


@LINUX
def test_torch_is_found_but_never_imported(source, torch_folder, compiler):
    """One file per vector width and one library, against the headers of the torch that is found."""
    done = setup(source, CXX=compiler, PYTHONPATH=str(torch_folder.parent))
    assert not done.returncode, done.stderr
    link = (source / "lesa" / "_native_cpu.so").read_text()
    assert f"-I{torch_folder}/include" in link and "-DTORCH_TARGET_VERSION=0x020a" in link
    assert "csrc/cpu/ops.cpp" in link and "kernels_16.o" in link


@LINUX
def test_cuda_is_built_where_nvcc_and_a_cuda_torch_are(source, torch_folder, compiler):
    tools = {"CXX": compiler, "LESA_TORCH_DIR": str(torch_folder)}
    assert "no 'not-here' on PATH; install the CUDA toolkit" in setup(source, **tools).stderr
    tools["NVCC"] = compiler
    assert "this torch has no CUDA; set LESA_BUILD_EXT=1" in setup(source, **tools).stderr
    assert not (source / "lesa" / "_native_cuda.so").exists()
    (torch_folder / "lib").mkdir()
    (torch_folder / "lib" / "libtorch_cuda.so").touch()
    assert not setup(source, **tools, LESA_CUDA_ARCHS="80;90a").returncode
    link = (source / "lesa" / "_native_cuda.so").read_text()
    assert "csrc/cuda/ops.cpp" in link and "arch=compute_90a,code=sm_90a" in link


@LINUX
def test_the_native_wheel_is_bound_to_no_python(source, torch_folder, compiler):
    (source / "lesa" / "stale.so").write_bytes(b"left over")
    done = setup(source, *backend("build_wheel"), CXX=compiler, LESA_TORCH_DIR=str(torch_folder))
    assert not done.returncode, done.stderr
    name = done.stdout.splitlines()[-1]
    assert re.search(r"-py3-none-linux_\w+\.whl$", name)
    names = zipfile.ZipFile(source / name).namelist()
    assert [n for n in names if n.endswith(".so")] == ["lesa/_native_cpu.so"]


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """The CUDA library made by the real nvcc, what ptxas says of it, and the folder of its PTX."""
    spec = importlib.util.find_spec("torch")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH: the CUDA kernels cannot be compiled")
    made = tmp_path_factory.mktemp("cuda")
    script = stand_in(made / "compiler")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={made}", f"--build-temp={made}"],
        cwd=ROOT,
        env={
            **os.environ,
            "LESA_BUILD_EXT": "1",
            "LESA_TORCH_DIR": str(Path(spec.origin).parent),
            "LESA_CUDA_ARCHS": ";".join(ARCHS),
            "CXX": script,  # this is about the CUDA part
            "NVCC": f"nvcc -Xptxas=-v --keep --keep-dir={made}",
        },
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stdout + done.stderr
    return made / "lesa" / "_native_cuda.so", done.stderr, made


def kernels(report: str, arch: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes spilled of each kernel compiled for an architecture."""
    found = {}
    for entry in report.split("Compiling entry function ")[1:]:
        name, target = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        if target == f"sm_{arch}":
            found[name] = registers, sum(map(int, spilled.groups()))
    return found


@LINUX
@pytest.mark.parametrize("arch", ARCHS)
def test_cuda_kernels_do_not_spill(cuda, arch):
    """Two kernels of three dtypes at six packed and two plain histories; 8 blocks fit on an SM."""
    found = kernels(cuda[1], arch)
    assert len(found) == 2 * 3 * (6 + 2)
    assert not any(spilled for _, spilled in found.values())
    few = {name: count for name, (count, _) in found.items() if "Li16E" not in name}
    assert max(few.values()) <= 80, few
    assert max(count for count, _ in found.values()) <= 168


@LINUX
def test_cuda_kernels_read_and_write_128_bits(cuda):
    (path,) = cuda[2].glob("kernels*compute_80*.ptx")
    entries = re.split(r"\.visible \.entry |\.entry ", path.read_text())[1:]
    packed = [entry for entry in entries if not re.match(r"\w+Li(4|16)ELi1E", entry)]
    assert len(packed) == 2 * 3 * 6
    for entry in packed:
        assert "ld.global.L1::no_allocate.v4.b32" in entry
        assert re.search(r"st\.global\.v4\.\w+", entry), entry[:200]


@LINUX
def test_the_cuda_library_loads_beside_a_torch_without_cuda(cuda):
    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "for name in ('mix_out', 'mix_modulate_out'):\n"
        "    name = f'lesa_native::{name}'\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, 'CUDA'), name\n"
    )
    subprocess.run([sys.executable, "-c", code, str(cuda[0])], check=True)


def test_the_sdist_can_build_it(source):
    done = setup(source, *backend("build_sdist"), LESA_BUILD_EXT="0")
    assert not done.returncode, done.stderr
    with tarfile.open(source / done.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    paths = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    assert {path.relative_to(ROOT).as_posix() for path in paths} <= names
