"""What a release must pass before it is tagged: `make release-check`.

    python tests/release_check.py --out dist [--install] [--python python3.13]

Builds wheel and sdist of lesa and lesa-testbed, checks their metadata with twine, builds lesa's
wheel again from its sdist, and imports it where what it requires is installed and nothing more.
That environment is made of the packages that are installed here; with --install of freshly
installed ones, which takes minutes and a network, and may be of another Python. The checkout must
be clean. Needs the packages build and twine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    PathDistribution,
    distribution,
)
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 2_000_000  # of lesa's wheel and sdist
CHECKS = (
    "import lesa; [getattr(lesa, name) for name in lesa.__all__]; print(lesa.__file__)",
    "from lesa.cli.recipe import read_recipe, recipe_names\n"
    "assert recipe_names(); [read_recipe(name) for name in recipe_names()]",
    "from lesa.util.prompts import own_prompts; assert len(own_prompts()) == 100",
    "from lesa.util.source import require_source; print(require_source('release').commit)",
    "import sys; sys.argv = ['lesa', '--version']; from lesa.cli import main; main()",
)


def run(*command: object, cwd: Path = ROOT, **variables: str) -> str:
    """What a command writes; ends the check where it fails."""
    words = [str(word) for word in command]
    environment = {**os.environ, **variables}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"release-check: {' '.join(words)[:200]}\n{done.stdout}{done.stderr}")
    return done.stdout


def build(source: Path, out: Path) -> list[Path]:
    """Wheel and sdist of a folder, pure Python."""
    before = set(out.glob("*")) if out.exists() else set()
    options = ("--no-isolation", "--outdir", out)
    run(sys.executable, "-m", "build", *options, source, LESA_BUILD_EXT="0")
    return sorted(set(out.glob("*")) - before)


def check_version(files: list[Path]) -> str:
    """The version, which files, changelog and citation agree on."""
    version = re.search(r'"(.+)"', (ROOT / "lesa" / "_version.py").read_text())
    assert version is not None
    found = version[1]
    names = {file.name.split("-")[1].removesuffix(".tar.gz") for file in files}
    told = {
        "files": names == {found},
        "CITATION.cff": f"\nversion: {found}\n" in (ROOT / "CITATION.cff").read_text(),
        "CHANGELOG.md": f"\n## {found}" in (ROOT / "CHANGELOG.md").read_text(),
    }
    if wrong := [name for name, right in told.items() if not right]:
        sys.exit(f"release-check: {' and '.join(wrong)} know no version {found}")
    return found


def check_sdist(sdist: Path, wheel: Path, folder: Path) -> None:
    """The wheel that the sdist makes holds the same files as the checkout's."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (again,) = (
        file for file in build(next(folder.iterdir()), folder / "again") if file.suffix == ".whl"
    )
    names = [sorted(zipfile.ZipFile(file).namelist()) for file in (wheel, again)]
    if names[0] != names[1]:
        sys.exit(f"release-check: wheels differ in {sorted(set(names[0]) ^ set(names[1]))[:20]}")


def check_size(files: list[Path]) -> None:
    """lesa is small: the embedded pipelines have a distribution of their own."""
    for file in files:
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB")
        if file.stat().st_size > MOST_BYTES:
            sys.exit(f"release-check: {file.name} has more than {MOST_BYTES / 1e6:.0f} MB")


def required(wheel: Distribution) -> Iterator[Distribution]:
    """What an installation of a wheel without extras brings besides."""
    seen: set[tuple[str, str]] = set()
    pending: list[tuple[str, str]] = [("", "")]
    while pending:
        key = pending.pop()
        with suppress(PackageNotFoundError):  # of a marker that a package cannot express
            found = distribution(key[0]) if key[0] else wheel
            if key[0]:
                yield found
            for requirement in map(Requirement, found.requires or ()):
                marker = requirement.marker
                if marker is None or marker.evaluate({"extra": key[1]}):
                    inner = canonicalize_name(requirement.name)
                    more = {(inner, extra) for extra in ("", *requirement.extras)} - seen
                    pending += more
                    seen |= more


def check_import(wheel: Path, folder: Path, install: bool, interpreter: str) -> None:
    """lesa works where nothing but what it requires is installed."""
    python, site = folder / "env" / "bin" / "python", folder / "site"
    run(interpreter, "-m", "venv", *([] if install else ["--without-pip"]), folder / "env")
    site.mkdir()
    if install:
        constraints = ROOT / "constraints.txt"
        run(python, "-m", "pip", "install", "--quiet", "-c", constraints, wheel)
    else:
        zipfile.ZipFile(wheel).extractall(site)
        (info,) = site.glob("*.dist-info")
        for found in required(PathDistribution(info)):
            link(found, site)
    for code in CHECKS:
        print(run(python, "-c", code, cwd=folder, PYTHONPATH=str(site)).strip())


def link(found: Distribution, site: Path) -> None:
    """A package's files, as links, in another folder."""
    tops = {file.parts[0] for file in found.files or () if file.parts[0] != ".."}
    for top in tops - {"__pycache__"}:
        target = site / top
        if not target.exists():
            target.symlink_to(Path(str(found.locate_file(top))).resolve())


def main() -> None:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--install", action="store_true", help="install what lesa requires anew")
    parser.add_argument("--python", default=sys.executable, help="for --install; default: this")
    options = parser.parse_args()
    if options.python != sys.executable and not options.install:
        parser.error("--python: packages that are installed here are this Python's; add --install")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = build(ROOT, folder / "dist")
        version = check_version(files)
        others = build(ROOT / "testbed", folder / "testbed")
        print(run(sys.executable, "-m", "twine", "check", "--strict", *files, *others).strip())
        sdist, wheel = (next(f for f in files if f.name.endswith(e)) for e in (".tar.gz", ".whl"))
        (folder / "again").mkdir()
        check_sdist(sdist, wheel, folder / "again")
        check_size(files)
        check_import(wheel, folder, options.install, options.python)
        options.out.mkdir(parents=True, exist_ok=True)
        for file in [*files, *others]:
            (options.out / file.name).write_bytes(file.read_bytes())
    print(f"release-check: lesa {version} is ready in {options.out}")


if __name__ == "__main__":
    main()
