"""Procedural captioned scenes: the data that every embedded pipeline is trained on.

A scene is one or two coloured, textured shapes on a muted background. What the caption names is
fixed (shape, colour, size, texture, place or relation, background tones); what it leaves open
varies freely (exact place, tilt, texture phase, gradient direction, background waves), so that a
denoiser has something to decide along its trajectory.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
HUES = {
    "red": 0,
    "orange": 28,
    "yellow": 56,
    "green": 120,
    "cyan": 180,
    "blue": 222,
    "purple": 272,
    "pink": 322,
}
COLOURS = tuple(HUES)
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = {"small": (0.12, 0.145), "large": (0.20, 0.235)}  # radius as a share of the image side
TONES = {
    "white": (0.93, 0.93, 0.93),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.10, 0.10, 0.10),
    "brown": (0.42, 0.36, 0.31),
    "slate": (0.28, 0.32, 0.38),
}
RELATIONS = ("left of", "right of", "above", "below")
PLACES = tuple(
    f"at the {name}"
    for name in (
        "top left",
        "top",
        "top right",
        "left",
        "center",
        "right",
        "bottom left",
        "bottom",
        "bottom right",
    )
)
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
REACH = (0.09, 0.13)  # share of the side that a moving scene travels to either side of its place
FRAMES = 9
MAX_TILT = 15.0  # degrees; more would turn a square into a diamond
FREE, NEAT = 1.0, 0.25  # how much of tilt and jitter a scene uses
_SPLIT = {"train": 0, "test": 1_000_003}  # first seed of each split


@dataclass(frozen=True)
class Item:
    """One shape: what the caption says of it, and where it is (centre, radius in shares of the
    side; tilt in degrees)."""

    shape: str
    colour: str
    size: str
    texture: str
    x: float
    y: float
    radius: float
    tilt: float
    phase: float

    @property
    def words(self) -> str:
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"a {self.size} {self.colour} {texture}{self.shape}"


@dataclass(frozen=True)
class Scene:
    """Items and background of one picture; ``relation`` is a place for one item, a relation for
    two."""

    items: tuple[Item, ...]
    relation: str
    tones: tuple[str, str]
    direction: float
    waves: tuple[float, float, float]

    @property
    def caption(self) -> str:
        ground = (
            self.tones[0]
            if self.tones[0] == self.tones[1]
            else f"{self.tones[0]} to {self.tones[1]}"
        )
        subject = f" {self.relation} ".join(item.words for item in self.items)
        if len(self.items) == 1:
            subject = f"{subject} {self.relation}"
        return f"{subject} on a {ground} background"


def _centres(
    rng: Random, relation: str, radii: tuple[float, ...], freedom: float
) -> list[tuple[float, float]]:
    def jitter(width: float) -> float:
        return freedom * rng.uniform(-width, width)

    if relation in PLACES:
        row, column = divmod(PLACES.index(relation), 3)
        return [(0.27 + 0.23 * column + jitter(0.035), 0.27 + 0.23 * row + jitter(0.035))]
    gap = max(0.40, sum(radii) + 0.05) + abs(jitter(0.06))
    middle, across = 0.5 + jitter(0.03), 0.5 + jitter(0.16)
    slant = jitter(0.08)
    first, second = (middle - gap / 2, across - slant), (middle + gap / 2, across + slant)
    if relation in ("right of", "below"):
        first, second = second, first
    return [first, second] if relation in ("left of", "right of") else [first[::-1], second[::-1]]


def sample_scene(rng: Random, freedom: float = NEAT) -> Scene:
    """Draw one scene; ``freedom`` in [0, 1] scales tilt and the jitter of places.

    The same ``rng`` state gives the same caption whatever the freedom.
    """
    count = rng.choice((1, 1, 2, 2, 2))
    relation = rng.choice(PLACES if count == 1 else RELATIONS)
    colours = rng.sample(COLOURS, count)
    sizes = [rng.choice(tuple(SIZES)) for _ in range(count)]
    radii = tuple(rng.uniform(*SIZES[size]) for size in sizes)
    items = tuple(
        Item(
            rng.choice(SHAPES),
            colour,
            size,
            rng.choice(TEXTURES),
            x,
            y,
            radius,
            freedom * rng.uniform(-MAX_TILT, MAX_TILT),
            rng.random(),
        )
        for colour, size, radius, (x, y) in zip(
            colours, sizes, radii, _centres(rng, relation, radii, freedom), strict=True
        )
    )
    tones = (rng.choice(tuple(TONES)), rng.choice(tuple(TONES)))
    waves = (rng.uniform(2.0, 5.0), rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi))
    return Scene(items, relation, tones, rng.choice((0.0, 90.0, 45.0, 135.0)), waves)


def scenes(
    count: int, seed: int = 0, split: str = "train", *, freedom: float = NEAT, crowd: int = 0
) -> list[Scene]:
    """``count`` scenes of a split; the splits share no seed.

    With ``crowd`` that many uncaptioned shapes are scattered over each scene: pictures in which
    colour and texture fill more of the area, for the autoencoder.
    """
    rng = Random(_SPLIT[split] + seed)
    return [_crowded(sample_scene(rng, freedom), rng, crowd) for _ in range(count)]


@dataclass(frozen=True)
class Clip:
    """A scene whose items drift together; half way they are where the caption says."""

    scene: Scene
    motion: str
    reach: float

    @property
    def caption(self) -> str:
        return f"{self.scene.caption} moving {self.motion}"

    def at(self, time: float) -> Scene:
        """The scene at ``time`` in [-1, 1]."""
        dx, dy = (self.reach * time * direction for direction in MOTIONS[self.motion])
        moved = tuple(replace(item, x=item.x + dx, y=item.y + dy) for item in self.scene.items)
        return replace(self.scene, items=moved)


def clips(count: int, seed: int = 0, split: str = "train", *, crowd: int = 0) -> list[Clip]:
    """``count`` moving scenes of a split."""
    rng = Random(_SPLIT[split] + seed)
    drawn = []
    for _ in range(count):
        scene = _crowded(sample_scene(rng), rng, crowd)
        drawn.append(Clip(scene, rng.choice(tuple(MOTIONS)), rng.uniform(*REACH)))
    return drawn


def _crowded(scene: Scene, rng: Random, crowd: int) -> Scene:
    if not crowd:
        return scene
    more = [sample_scene(rng, FREE).items[0] for _ in range(crowd)]
    placed = [replace(item, x=rng.uniform(0.1, 0.9), y=rng.uniform(0.1, 0.9)) for item in more]
    return replace(
        scene, items=tuple(rng.sample([*scene.items, *placed], crowd + len(scene.items)))
    )


def captions(count: int, seed: int = 0, split: str = "test", *, moving: bool = False) -> list[str]:
    """Distinct captions of a split, of pictures or of moving scenes; test captions are redrawn
    until they differ from one another."""
    rng = Random(_SPLIT[split] + seed)
    found: dict[str, None] = {}
    while len(found) < count:
        caption = sample_scene(rng).caption
        found.setdefault(f"{caption} moving {rng.choice(tuple(MOTIONS))}" if moving else caption)
    return list(found)


def coverage(
    shape: str, dx: Array, dy: Array, radius: float, tilt: float, softness: float
) -> Array:
    """Antialiased mask in [0, 1] of a shape from its signed distance; ``dx, dy`` are offsets from
    its centre."""
    angle = np.deg2rad(tilt)
    u = np.cos(angle) * dx + np.sin(angle) * dy
    v = -np.sin(angle) * dx + np.cos(angle) * dy
    a, b = np.abs(u), np.abs(v)
    if shape == "circle":
        distance = np.hypot(u, v) - radius
    elif shape == "ring":
        distance = np.abs(np.hypot(u, v) - 0.78 * radius) - 0.24 * radius
    elif shape == "square":
        distance = np.maximum(a, b) - 0.86 * radius
    elif shape == "diamond":
        distance = (1.45 * a + 0.85 * b) / np.hypot(1.45, 0.85) - 0.62 * radius
    elif shape == "cross":
        arm = 0.32 * radius
        distance = np.minimum(np.maximum(a - radius, b - arm), np.maximum(a - arm, b - radius))
    else:  # triangle, apex up
        distance = np.maximum(v - 0.62 * radius, (0.87 * a - 0.5 * v) - 0.62 * radius)
    return np.clip(0.5 - distance / softness, 0, 1).astype(np.float32)


def _paint(item: Item, dx: Array, dy: Array) -> Array:
    base = np.array(colorsys.hsv_to_rgb(HUES[item.colour] / 360, 0.88, 0.95), np.float32)
    dark = np.array(colorsys.hsv_to_rgb(HUES[item.colour] / 360, 0.95, 0.50), np.float32)
    turn = 2 * np.pi * (dx + item.phase) * 11
    lift = 2 * np.pi * (dy + item.phase) * 11
    wave = {
        "plain": np.full_like(dx, -1.0),
        "striped": np.sin((turn + lift) / np.sqrt(2)),
        "dotted": np.sin(turn) + np.sin(lift) - 0.9,
        "checkered": 1.6 * np.sin(turn) * np.sin(lift),
    }[item.texture]
    share = np.clip(0.5 + 1.6 * wave, 0, 1)[..., None]
    return (base * (1 - share) + dark * share).astype(np.float32)


def render(scene: Scene, size: int = 64) -> Array:
    """The picture of a scene, ``[size, size, 3]`` in [0, 1]."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(axis, axis)
    angle = np.deg2rad(scene.direction)
    ramp = np.clip(0.5 + ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)) * 1.1, 0, 1)[
        ..., None
    ]
    first, second = (np.array(TONES[tone], np.float32) for tone in scene.tones)
    frequency, phase, heading = scene.waves
    wave = np.sin(2 * np.pi * frequency * (x * np.cos(heading) + y * np.sin(heading)) + phase)[
        ..., None
    ]
    picture = first * (1 - ramp) + second * ramp + 0.045 * wave
    for item in scene.items:
        dx, dy = x - np.float32(item.x), y - np.float32(item.y)
        mask = coverage(item.shape, dx, dy, item.radius, item.tilt, 1.5 / size)[..., None]
        picture = picture * (1 - mask) + _paint(item, dx, dy) * mask
    return np.clip(picture, 0, 1).astype(np.float32)


def render_batch(batch: list[Scene], size: int = 64) -> Any:
    """Pictures as a torch tensor ``[N, 3, size, size]`` in [-1, 1]."""
    import torch

    pictures = np.stack([render(scene, size) for scene in batch])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1


def render_clips(batch: list[Clip], size: int = 64) -> Any:
    """Videos as a torch tensor ``[N, 3, FRAMES, size, size]`` in [-1, 1]."""
    import torch

    times = np.linspace(-1, 1, FRAMES)
    videos = np.stack([[render(clip.at(float(t)), size) for t in times] for clip in batch])
    return torch.from_numpy(videos).permute(0, 4, 1, 2, 3).contiguous() * 2 - 1
