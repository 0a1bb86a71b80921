"""A forecaster by its name: slips are told with what was meant."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import lesa
from lesa.errors import LesaError
from lesa.forecasters.named import named
from lesa.forecasters.source import from_hub


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("FORA", "^forecaster='FORA': neither a folder nor a known method; did you mean 'fora'?"),
        ("Taylor1", "did you mean 'taylor-1'?"),
        ("fora,taylor-1", "^forecaster='fora,taylor-1': several names; give one$"),
        ("zzz", "^forecaster='zzz': neither a folder nor a known method; give the folder"),
    ],
)
def test_a_slip(name, told):
    with pytest.raises(LesaError, match=told):
        named(name)


def test_a_folder_without_a_forecaster_names_its_field(tiny_flux, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", tmp_path):
        with pytest.raises(LesaError, match=r"^forecaster='.*': .*config\.json cannot be read"):
            lesa.enable(tiny_flux, folder)


def test_a_file_that_looks_like_a_repository_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(LesaError, match="^forecaster='trained/config.json': .* is a file; give"):
        named("trained/config.json")


def test_without_a_network_the_hub_is_tried_once(monkeypatch, tmp_path):
    """Then what was downloaded before is taken, or the reason told: no series of tries."""
    asked = []

    def unreachable(url, **_):
        asked.append(url)
        raise RuntimeError("Name or service not known")

    def download(repo, name, revision=None, local_files_only=False):
        assert local_files_only
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(LesaError, match=r"\(no connection: Name or service not known\); check the"):
        named("owner/name")
    assert len(asked) == 1
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "x"))
    assert from_hub("owner/name", "x") == tmp_path / "x"
