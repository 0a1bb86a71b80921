"""Are shape, colour and place of a generated picture what its caption says? Pure geometry, no
learned judge.

Shapes are saturated and backgrounds are not, so hue finds each named item; its mask is compared
with every shape's own mask over a grid of tilts (best intersection over union wins); its centroid
tells place and relation. ``python -m lesa_testbed.checker`` measures the embedded pipeline on
unseen captions.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from lesa_testbed.scenes import (
    COLOURS,
    HUES,
    MAX_TILT,
    MOTIONS,
    PLACES,
    RELATIONS,
    SHAPES,
    Array,
    clips,
    coverage,
    scenes,
)

MIN_AREA = 0.006  # share of the picture; the smallest item covers 0.012


@dataclass(frozen=True)
class Verdict:
    """What was right, averaged over the caption's items: each in [0, 1]."""

    shape: float
    colour: float
    place: float


def _hue_masks(picture: Array) -> dict[str, np.ndarray]:
    """Saturated pixels by nearest named hue; ``picture`` is ``[size, size, 3]`` in [0, 1]."""
    hsv = np.asarray(
        Image.fromarray((picture * 255).round().astype(np.uint8)).convert("HSV"), np.float32
    )
    hue, saturated = hsv[..., 0] * 360 / 255, (hsv[..., 1] > 115) & (hsv[..., 2] > 65)
    distance = np.stack([np.abs((hue - HUES[name] + 180) % 360 - 180) for name in COLOURS])
    nearest = distance.argmin(0)
    return {name: saturated & (nearest == index) for index, name in enumerate(COLOURS)}


@lru_cache(maxsize=4096)
def _template(shape: str, side: int, radius: float, tilt: float) -> np.ndarray:
    axis = (np.arange(side, dtype=np.float32) - (side - 1) / 2) / side
    dx, dy = np.meshgrid(axis, axis)
    mask = coverage(shape, dx, dy, radius, tilt, 1.5 / side) > 0.5
    return mask


def _centred(mask: np.ndarray) -> np.ndarray:
    """Shift a mask so that its bounding box sits in the middle."""
    rows, columns = np.where(mask)
    shift = [(mask.shape[0] - 1 - values.min() - values.max()) // 2 for values in (rows, columns)]
    return np.roll(mask, shift, (0, 1))


def recognise(mask: np.ndarray) -> str:
    """The shape whose mask overlaps best, over radii and tilts."""
    target, scores = _centred(mask), {}
    for shape in SHAPES:
        scores[shape] = max(
            (lambda union, both: both / union)((target | template).sum(), (target & template).sum())
            for radius in np.arange(0.10, 0.25, 0.01)
            for tilt in np.arange(-MAX_TILT, MAX_TILT + 1, 5)
            for template in (
                _centred(_template(shape, mask.shape[0], round(float(radius), 3), float(tilt))),
            )
        )
    return max(scores, key=lambda name: scores[name])


def is_caption(text: str) -> bool:
    """Whether a text is of the grammar that the embedded pipelines were trained on."""
    try:
        items, _ = _items(text)
    except (StopIteration, ValueError):  # a colour without a shape, or no place
        return False
    return 0 < len(items) <= 2


def _items(caption: str) -> tuple[list[tuple[str, str]], str]:
    """(colour, shape) of each item and the relation or place."""
    words = caption.split()
    items = [
        (word, next(w for w in words[i:] if w in SHAPES))
        for i, word in enumerate(words)
        if word in COLOURS
    ]
    known = PLACES if len(items) == 1 else RELATIONS
    relation = max((phrase for phrase in known if f" {phrase} " in f" {caption} "), key=len)
    return items, relation


def _in_place(centres: list[tuple[float, float]], relation: str) -> bool:
    if len(centres) == 1:
        row, column = divmod(PLACES.index(relation), 3)
        x, y = centres[0]
        return abs(x - 0.27 - 0.23 * column) < 0.115 and abs(y - 0.27 - 0.23 * row) < 0.115
    (x0, y0), (x1, y1) = centres
    ahead = {"left of": x1 - x0, "right of": x0 - x1, "above": y1 - y0, "below": y0 - y1}
    return ahead[relation] > 0.15 and ahead[relation] == max(ahead.values())


def check(picture: Array, caption: str) -> Verdict:
    """Judge one picture ``[size, size, 3]`` in [0, 1] against its caption."""
    items, relation = _items(caption)
    masks = {name: mask for name, mask in _hue_masks(picture).items() if mask.mean() > MIN_AREA}
    largest = sorted(masks, key=lambda name: masks[name].sum(), reverse=True)[: len(items)]
    colours = [colour for colour, _ in items]
    colour = sum(name in largest for name in colours) / len(items)
    shape = sum(name in masks and recognise(masks[name]) == form for name, form in items) / len(
        items
    )
    if any(name not in masks for name in colours):
        return Verdict(shape, colour, 0.0)
    centres = [
        tuple((np.argwhere(masks[name]).mean(0) / picture.shape[0])[::-1]) for name in colours
    ]
    return Verdict(shape, colour, float(_in_place(centres, relation)))


def drifts(video: Array, caption: str) -> bool:
    """Do the named colours of ``[frames, size, size, 3]`` move where the caption says, more than
    across?"""
    direction = np.array(MOTIONS[caption.split()[-1]])
    colours = {colour for colour, _ in _items(caption)[0]}
    ends = []
    for picture in (video[0], video[-1]):
        named = [mask for name, mask in _hue_masks(picture).items() if name in colours]
        places = np.argwhere(np.logical_or.reduce(named))
        if not len(places):
            return False  # nothing of these colours is there
        ends.append(places.mean(0)[::-1] / len(picture))
    travelled = ends[1] - ends[0]
    along = float(travelled @ direction)
    return along > 0.05 and along > np.abs(travelled @ direction[::-1])


def accuracy(pictures: Array, captions: list[str]) -> dict[str, float]:
    """Mean shape, colour and place accuracy over pictures ``[N, size, size, 3]``, or over the
    middle frames of videos ``[N, frames, size, size, 3]``, whose ``motion`` is checked too."""
    video = pictures.ndim == 5
    stills = pictures[:, pictures.shape[1] // 2] if video else pictures
    verdicts = [check(picture, text) for picture, text in zip(stills, captions, strict=True)]
    found = {
        name: float(np.mean([getattr(v, name) for v in verdicts]))
        for name in ("shape", "colour", "place")
    }
    if video:
        found["motion"] = float(
            np.mean([drifts(v, text) for v, text in zip(pictures, captions, strict=True)])
        )
    return found


def unseen(count: int, name: str = "flux") -> list[str]:
    """Test captions that no training scene of any pipeline happens to have: there are only so
    many short ones."""
    from lesa.testbed import prompts
    from lesa_testbed.makers import flux, hunyuan

    plan = flux.Plan()  # the largest pools: those of other pictures begin with the same scenes
    pool = scenes(max(plan.free_scenes, plan.neat_scenes), plan.seed)
    video = clips(hunyuan.Plan.clips, hunyuan.Plan.seed)
    trained = {scene.caption for scene in pool} | {clip.caption for clip in video}
    return [caption for caption in prompts(name, 2 * count) if caption not in trained][:count]


def main() -> None:
    import torch

    from lesa.hooks.prompt_inputs import prompt_arguments
    from lesa.testbed import load, settings

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pipeline", default="flux", help="name of an embedded pipeline or a folder"
    )
    parser.add_argument("--like", help="embedded pipeline whose settings a folder has")
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    like = options.like or options.pipeline
    pipe, wanted, call = load(options.pipeline), unseen(options.count, like), settings(like)
    pictures = []
    for start in range(0, len(wanted), 20):
        rows = range(start, min(start + 20, len(wanted)))
        generators = [torch.Generator().manual_seed(row) for row in rows]
        arguments = prompt_arguments(wanted, call, rows)
        pictures.append(pipe(generator=generators, output_type="np", **arguments)[0])
    print(json.dumps({"captions": len(wanted), **accuracy(np.concatenate(pictures), wanted)}))


if __name__ == "__main__":
    main()
