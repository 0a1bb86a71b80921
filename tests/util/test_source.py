"""The commit that runs: of a real git repository, and of a package as pip installs it."""

from __future__ import annotations

import base64
import hashlib
import subprocess
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from lesa.errors import LesaError
from lesa.util import source
from lesa.util.source import require_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A small repository with a committed package."""
    (tmp_path / "lesa").mkdir()
    (tmp_path / "lesa" / "a.py").write_text("1\n")
    (tmp_path / "README.md").write_text("read me\n")
    (tmp_path / ".gitignore").write_text("*.so\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *own, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def refused(root: Path) -> str:
    with pytest.raises(LesaError, match=r"^submit='f': ") as caught:
        require_source("submit='f'", root)
    return str(caught.value)


def test_a_clean_checkout_is_its_commit(checkout):
    """Whatever lies beside the source: prompts, pictures, and what git ignores."""
    (checkout / "prompts.txt").write_text("a\n")
    (checkout / "lesa" / "native.so").write_bytes(b"")
    found = require_source("submit='f'", checkout)
    assert (found.kind, found.commit) == ("checkout", git(checkout, "rev-parse", "HEAD"))


@pytest.mark.parametrize("path", ["lesa/a.py", "README.md", "lesa/new.py", "recipes/ä b.yaml"])
def test_a_changed_file_and_new_source_are_refused(path, checkout):
    (checkout / path).parent.mkdir(exist_ok=True)
    (checkout / path).write_text("changed\n")
    assert f"differs from its commit ({path}); commit or undo it" in refused(checkout)


def test_several_changes_are_counted_and_a_staged_one_is_one(checkout):
    (checkout / "lesa" / "a.py").write_text("2\n")
    (checkout / "README.md").unlink()
    git(checkout, "add", "lesa")
    assert "and 1 more); commit or undo it" in refused(checkout)


def test_a_folder_that_git_does_not_read_is_told(checkout):
    (checkout / ".git" / "HEAD").write_text("nothing\n")
    assert "git does not tell the commit (fatal: " in refused(checkout)


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A package with its RECORD, as pip leaves it in site-packages."""
    info = tmp_path / "lesa-0.2.0.dist-info"
    for name, text in (("lesa/a.py", "1\n"), ("lesa/commit.txt", f"{COMMIT}\n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lesa\nVersion: 0.2.0\n")
    lines = [
        f"{path.relative_to(tmp_path)},sha256={record(path.read_bytes())},2"
        for path in (tmp_path / "lesa").iterdir()
    ]
    (info / "RECORD").write_text("\n".join([*lines, "lesa/__pycache__/a.pyc,,"]) + "\n")
    monkeypatch.setattr(source, "distribution", lambda _: PathDistribution(info))
    return tmp_path


def record(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def test_an_installed_package_is_the_commit_it_was_built_from(installed):
    found = require_source("submit='f'", installed)
    assert (found.kind, found.commit) == ("installed", COMMIT)
    (installed / "lesa" / "a.py").write_text("2\n")
    assert "(lesa/a.py); install lesa anew" in refused(installed)
    (installed / "lesa" / "a.py").unlink()
    assert "(lesa/a.py); install lesa anew" in refused(installed)


def test_a_file_that_nobody_installed_is_refused(installed):
    (installed / "lesa" / "more.py").write_text("")
    assert "(lesa/more.py); install lesa anew" in refused(installed)


def test_pip_tells_the_commit_of_a_repository_that_it_installed(installed):
    (installed / "lesa" / "commit.txt").unlink()
    record = installed / "lesa-0.2.0.dist-info" / "RECORD"
    lines = [line for line in record.read_text().splitlines() if "commit.txt" not in line]
    record.write_text("\n".join(lines))
    assert "installed without its commit; run it from a checkout" in refused(installed)
    told = '{"url": "https://a.example/lesa", "vcs_info": {"vcs": "git", "commit_id": "%s"}}'
    (record.parent / "direct_url.json").write_text(told % COMMIT)
    assert require_source("submit='f'", installed).commit == COMMIT


def test_a_copy_that_is_neither_is_refused(installed, tmp_path_factory):
    assert "neither a checkout that git knows nor installed" in refused(
        tmp_path_factory.mktemp("copy")
    )
