"""What the page draws of two runs."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from lesa.play import views
from lesa.play.player import Made


def made(picture: torch.Tensor, seconds: float = 1.0, notes: tuple[str, ...] = ()) -> Made:
    return Made(picture, seconds, (0, 2), 4, notes)


def test_a_small_picture_is_enlarged_by_whole_pixels():
    picture = torch.rand(3, 8, 16)
    image = views.still(picture)
    factor = views.SMALLEST // 8
    assert image.size == (16 * factor, 8 * factor)
    expected = (picture * 255).round().byte().movedim(0, -1).numpy()
    assert np.array_equal(np.asarray(image)[::factor, ::factor], expected)
    assert views.still(torch.rand(3, 400, 500)).size == (500, 400)


def test_values_out_of_range_and_nan_are_drawn():
    picture = torch.full((3, 400, 400), 2.0)
    picture[0], picture[1] = float("nan"), -1.0
    assert np.asarray(views.still(picture))[0, 0].tolist() == [0, 0, 255]


def test_a_video_moves_with_all_its_frames():
    video = torch.stack([torch.full((3, 400, 400), level) for level in (0.0, 0.5, 1.0)])
    with Image.open(io.BytesIO(views.moving(video))) as image:
        assert (image.n_frames, image.info["loop"]) == (3, 0)
        levels = []
        for number in range(3):
            image.seek(number)
            levels.append(np.asarray(image.convert("RGB")).mean())
    assert np.allclose(levels, [0, 127.5, 255], atol=3)  # WebP is lossy
    assert views.frame_of(video, 1).mean() == 0.5 and views.frame_of(video, 9).mean() == 1.0
    assert views.frame_of(video[0], 5) is not None and views.frame_of(video[0], 5).ndim == 3


def test_the_error_map_is_brightest_where_the_error_is():
    plain = torch.full((3, 400, 400), 0.5)
    other = plain.clone()
    other[:, 7, 9] += 0.3
    other[:, 8, 9] -= 0.1  # a third of it: red
    found = views.error_map(plain, other)
    pixels = np.asarray(found.picture)
    assert abs(found.brightest - 0.3) < 1e-6
    assert pixels[7, 9].tolist() == [255, 255, 255] and pixels[0, 0].tolist() == [0, 0, 0]
    assert abs(pixels[8, 9].astype(int) - [255, 0, 0]).max() <= 1


def test_rounding_is_not_drawn_as_an_error():
    plain = torch.full((3, 400, 400), 0.5)
    found = views.error_map(plain, plain + 1e-6)
    assert found.brightest == views.FAINTEST and np.asarray(found.picture).max() <= 1


def test_the_strip_has_a_box_for_every_step():
    text = views.strip((0, 3, 4), 6)
    assert text.count("<i ") == 6 and text.count('class="full"') == 3
    assert '"full" title="step 4: full"' in text and "3 of 6 steps in full" in text


def test_numbers_are_those_of_the_runs():
    plain, fast = torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.51)
    text = views.numbers(made(plain, 6.0), made(fast, 1.5))
    assert all(word in text for word in ("6.00 s", "1.50 s", "4.0x", "40.0 dB"))
    assert "identical" in views.numbers(made(plain), made(plain))
    alone = views.numbers(None, made(fast, 1.5))
    assert "running" in alone and "1.50 s" in alone and "dB" not in alone


def test_notes_are_no_html():
    assert "&lt;b&gt;" in views.numbers(None, made(torch.zeros(3, 4, 4), notes=("<b>",)))
