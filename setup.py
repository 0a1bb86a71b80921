"""The native part, recipes/ as a folder of the package, and the commit that a wheel is built from;
the rest is in pyproject.toml.

    LESA_BUILD_EXT=auto   (default) built where torch's headers and a compiler are found
    LESA_BUILD_EXT=1      built, or the build fails and says why
    LESA_BUILD_EXT=0      pure Python

torch is looked for, never imported and never required: in an isolated build it is absent and the
wheel is pure Python. For the native part: pip install --no-build-isolation -e .
LESA_TORCH_DIR (a folder `torch`), CXX, NVCC and LESA_CUDA_ARCHS (80;90a;100) say what to build
with. The libraries use LibTorch's stable ABI: one file serves torch >= 2.10 and every Python.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

MODE = os.environ.get("LESA_BUILD_EXT", "auto")
CSRC = Path("csrc")
STAMP = Path("lesa", "commit.txt")  # read by lesa/util/source.py
CXX = os.environ.get("CXX", "c++")
NVCC = os.environ.get("NVCC", "nvcc")
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]  # torch 2.10
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
WIDTHS: dict[int, list[str]] = {16: []}  # bytes of a vector -> flags
if platform.machine() in ("x86_64", "AMD64"):
    WIDTHS |= {32: ["-mavx2", "-mfma", "-mf16c"], 64: ["-mfma", "-mf16c", *AVX512]}


def torch_folder() -> Path | None:
    """Where torch is installed; found without running any of its code."""
    if given := os.environ.get("LESA_TORCH_DIR"):
        return Path(given)
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def missing(program: str) -> bool:
    return shutil.which(shlex.split(program)[0]) is None


def obstacle() -> str:
    """Why the native part cannot be built, in one sentence; empty where it can."""
    torch = torch_folder()
    if MODE not in ("auto", "0", "1"):
        raise SystemExit(f"lesa: LESA_BUILD_EXT is {MODE!r}; set it to auto, 1 or 0.")
    if MODE == "0":
        return "LESA_BUILD_EXT is 0; set it to 1 to build."
    if sys.platform != "linux":
        return f"the platform is {sys.platform}; the native part is built on Linux only."
    if not (CSRC / "cpu" / "ops.cpp").exists():
        return "csrc/ is missing; build from a checkout or from the sdist."
    if torch is None:
        return "no torch in the build environment; add --no-build-isolation or set LESA_TORCH_DIR."
    if not (torch / "include/torch/csrc/stable/library.h").exists():
        return f"{torch} has no stable-ABI headers; use torch 2.10 or newer."
    if missing(CXX):
        return f"no C++ compiler {CXX!r} on PATH; install g++ or set CXX."
    return ""


def cuda_obstacle() -> str:
    """Why the CUDA kernels cannot be built, or are not worth it by default."""
    if missing(NVCC):
        return f"no {NVCC!r} on PATH; install the CUDA toolkit or set NVCC."
    torch = torch_folder()
    if MODE != "1" and torch and not (torch / "lib" / "libtorch_cuda.so").exists():
        return "this torch has no CUDA; set LESA_BUILD_EXT=1 to build them all the same."
    return ""


def cpu_commands(output: Path, temporary: Path) -> list[list[str]]:
    """One object per vector width, then the operators and the library."""
    flags = [*shlex.split(CXX), "-std=c++17", "-fPIC", "-fvisibility=hidden"]
    torch, objects, commands = torch_folder(), [], []
    for width, instructions in WIDTHS.items():
        objects.append(str(temporary / f"kernels_{width}.o"))
        optimise = ["-O3", "-ffp-contract=fast", "-Wno-psabi", f"-DLESA_VECTOR_BYTES={width}"]
        source = str(CSRC / "cpu" / "kernels.cpp")
        commands.append([*flags, *optimise, *instructions, "-c", source, "-o", objects[-1]])
    link = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", "-o", str(output)]
    operators = ["-O2", *TARGET, f"-I{torch}/include", str(CSRC / "cpu" / "ops.cpp")]
    return [*commands, [*flags, "-shared", *operators, *objects, *link]]


def cuda_commands(output: Path, temporary: Path) -> list[list[str]]:
    """Kernels without torch's headers, then the operators and the library."""
    torch, kernels = torch_folder(), str(temporary / "kernels.o")
    archs = os.environ.get("LESA_CUDA_ARCHS", "80;90a;100").split(";")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags = [*shlex.split(NVCC), "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    link = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", "-o", str(output)]
    operators = [*TARGET, f"-I{torch}/include", str(CSRC / "cuda" / "ops.cpp")]
    return [
        [*flags, *targets, "-c", str(CSRC / "cuda" / "kernels.cu"), "-o", kernels],
        [*flags, *targets, "-shared", "-cudart=static", *operators, kernels, *link],
    ]


COMMANDS = {"lesa._native_cpu": cpu_commands, "lesa._native_cuda": cuda_commands}


class BuildNative(build_ext):
    """Runs the compiler; an optional library that fails is left out with a warning."""

    def get_ext_filename(self, fullname: str) -> str:  # bound to no CPython
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        output, temporary = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for folder in (output.parent, temporary):
            folder.mkdir(parents=True, exist_ok=True)
        for command in COMMANDS[ext.name](output, temporary):
            print("lesa:", shlex.join(command), flush=True)
            if code := subprocess.run(command).returncode:
                raise CompileError(f"{command[0]} ended with code {code}; its message is above.")


def commit() -> str:
    """What is built: as an sdist says, else git's, where nothing differs; empty where unknown."""
    if STAMP.exists():
        return STAMP.read_text()
    if not Path(".git").exists() or missing("git"):
        return ""
    run = partial(subprocess.run, capture_output=True, text=True, timeout=60)
    new = run(["git", "status", "--porcelain", "--", "lesa", "kernels", "csrc", "recipes"])
    tracked = run(["git", "status", "--porcelain", "--untracked-files=no"])
    head = run(["git", "rev-parse", "HEAD"])
    clean = not any(done.returncode for done in (new, tracked, head))
    return head.stdout if clean and not new.stdout and not tracked.stdout else ""


def stamp(folder: Path) -> None:
    """The commit in a package that is being built."""
    if found := commit():
        (folder / STAMP).write_text(found)


class Source(sdist):
    """Takes the commit along, since git's own folder is not in it."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        stamp(Path(base_dir))


class BuildPython(build_py):
    """Copies recipes/ into the package, where an installed lesa looks for them by name."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            stamp(Path(self.build_lib))
            folder = Path(self.build_lib) / "lesa" / "recipes"
            folder.mkdir(parents=True, exist_ok=True)
            for recipe in sorted(Path("recipes").glob("*.yaml")):
                shutil.copy(recipe, folder)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.has_ext_modules() else tag


def extensions() -> list[Extension]:
    if reason := obstacle():
        if MODE == "1":
            raise SystemExit(f"lesa: LESA_BUILD_EXT is 1, but {reason}")
        print(f"lesa: without the native part: {reason}", file=sys.stderr)
        return []
    names = ["cpu"]
    if reason := cuda_obstacle():
        print(f"lesa: without the CUDA kernels: {reason}", file=sys.stderr)
    else:
        names.append("cuda")
    sources = {name: sorted(map(str, (CSRC / name).glob("*.c[pu]*"))) for name in names}
    optional = MODE != "1"
    return [Extension(f"lesa._native_{n}", sources[n], optional=optional) for n in names]


setup(
    ext_modules=extensions(),
    cmdclass={
        "build_ext": BuildNative,
        "build_py": BuildPython,
        "bdist_wheel": Wheel,
        "sdist": Source,
    },
)
