"""A forecaster by its name: slips are told with what was meant."""

from __future__ import annotations

import pytest

import lesa
from lesa.errors import LesaError
from lesa.forecasters.named import named


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
