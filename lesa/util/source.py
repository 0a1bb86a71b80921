"""Which lesa this is: a commit, where nothing was changed since."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from lesa._version import __version__
from lesa.errors import LesaError
from lesa.util.files import one_line

__all__ = ["Source", "require_source"]

FOLDERS = ("lesa", "kernels", "csrc", "testbed", "recipes")  # of a checkout; new files count there
PACKAGES = ("lesa", "lesa_kernels")  # of an installation
STAMP = "commit.txt"  # beside _version.py in a wheel: the commit that setup.py built it from
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Source:
    """The version, the full hash of the commit, and where its files lie."""

    version: str
    commit: str
    kind: Literal["checkout", "installed"]


def require_source(field: str, root: Path = ROOT) -> Source:
    """The commit that runs.

    Args:
        field: the field and value that ask for it, as an error begins.
        root: where the package lesa lies.

    Raises: LesaError if a file differs from the commit's, a source file is new, or the commit is
        not known.
    """
    if (root / ".git").exists():
        commit, changed, kind = _head(field, root), [*_changed(field, root)], "checkout"
    else:
        package = _package(field, root)
        commit, changed, kind = _stamp(package, root), [*_altered(package, root)], "installed"
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        remedy = "commit or undo it" if kind == "checkout" else "install lesa anew"
        raise LesaError(
            f"{field}: the source differs from its commit ({changed[0]}{others}); {remedy}"
        )
    if not commit:
        raise LesaError(
            f"{field}: this lesa was installed without its commit; run it from a checkout, or"
            " install it from a clean one that git knows"
        )
    return Source(__version__, commit, "checkout" if kind == "checkout" else "installed")


def _head(field: str, root: Path) -> str:
    return _git(field, root, "rev-parse", "HEAD").strip()


def _changed(field: str, root: Path) -> Iterator[str]:
    """Files of a checkout that differ from its commit, and new ones where source lies."""
    for line in _git(field, root, "status", "--porcelain", "-z", "--untracked-files=all").split(
        "\0"
    ):
        new, path = line[:2] == "??", line[3:]
        if path and (not new or path.startswith(tuple(f"{name}/" for name in FOLDERS))):
            yield path


def _git(field: str, root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        reason = one_line(Exception(*told))
        raise LesaError(f"{field}: git does not tell the commit ({reason}); mend that") from None
    return done.stdout


def _package(field: str, root: Path) -> Distribution:
    """The installed lesa that runs."""
    try:
        found = distribution("lesa")
        here = Path(str(found.locate_file("lesa"))).resolve() == root / "lesa"
    except PackageNotFoundError:
        here = False
    if not here:
        raise LesaError(
            f"{field}: this lesa is neither a checkout that git knows nor installed; clone it, or"
            " install it with pip"
        )
    return found


def _stamp(package: Distribution, root: Path) -> str:
    """The commit that an installed lesa was built from; empty where nothing tells."""
    stamp = root / "lesa" / STAMP
    if stamp.is_file():
        return stamp.read_text().strip()
    told = json.loads(package.read_text("direct_url.json") or "{}")
    return str(told.get("vcs_info", {}).get("commit_id", ""))


def _altered(package: Distribution, root: Path) -> Iterator[str]:
    """Files of an installation that are not as they were installed, and new ones."""
    listed = set()
    # not package.files, which leaves out what is missing from Python 3.12 on
    for name, digest, _ in csv.reader((package.read_text("RECORD") or "").splitlines()):
        if name.split("/")[0] in PACKAGES:
            listed.add(name)
            mode, _, value = digest.partition("=")
            path = root / name
            if mode and (not path.is_file() or value != _digest(path, mode)):
                yield name
    for name in PACKAGES:
        found = (path.relative_to(root).as_posix() for path in (root / name).rglob("*.py"))
        yield from (path for path in sorted(found) if path not in listed)


def _digest(path: Path, mode: str) -> str:
    """As a wheel's RECORD writes it."""
    found = hashlib.new(mode, path.read_bytes()).digest()
    return base64.urlsafe_b64encode(found).decode().rstrip("=")
