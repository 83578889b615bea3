"""Scenes: one or two sprites at a random place, size, tilt and flip on a plain or graded background, with a caption.

Every scene is a pure function of (seed, index, split), drawn from uniform doubles only, so that it is the same on every
machine. Object pairs and object-background pairs are split once and for all: what `split="heldout"` shows was never in
`split="train"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from hypersd.emoji.atlas import names, sprites

SIZE = 64
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (205, 60, 55),
    "orange": (240, 150, 60),
    "yellow": (245, 220, 100),
    "green": (90, 165, 90),
    "blue": (80, 130, 210),
    "purple": (135, 90, 180),
    "pink": (245, 170, 195),
    "brown": (130, 90, 65),
    "gray": (140, 140, 145),
    "white": (245, 245, 245),
}
HELDOUT = 0.1  # share of the object pairs, and of the object-background pairs
SINGLE = 0.4  # share of the scenes with one object


@dataclass(frozen=True)
class Scenes:
    """images (N, 64, 64, 3) uint8; masks (N, 2, 64, 64) bool, what is visible of the first and the second object."""

    images: np.ndarray
    captions: list[str]
    objects: list[tuple[int, ...]]
    background: np.ndarray
    masks: np.ndarray


def _hash(*values: int) -> float:
    """A uniform double in [0, 1) from integers (splitmix64), the same everywhere."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value + 0x9E3779B97F4A7C15)) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state / 2**64


def is_heldout(objects: tuple[int, ...], background: int) -> bool:
    """Whether a scene shows a held-out object pair or a held-out object on a background."""
    if any(_hash(1, item, background) < HELDOUT for item in objects):
        return True
    return len(objects) == 2 and _hash(2, min(objects), max(objects)) < HELDOUT


def caption(objects: tuple[int, ...], background: int) -> str:
    """For instance "a fox and a red apple on a blue background"."""
    nouns = [names()[item] for item in objects]
    phrases = [("an " if noun[0] in "aeiou" and noun != "unicorn" else "a ") + noun for noun in nouns]
    ground = list(BACKGROUNDS)[background]
    return f"{' and '.join(phrases)} on {'an' if ground[0] in 'aeiou' else 'a'} {ground} background"


def contents(seed: int, index: int, split: str) -> tuple[tuple[int, ...], int]:
    """The objects and the background of one scene."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    rng = np.random.Generator(np.random.PCG64([seed, index, 0 if split == "train" else 1]))
    count = len(names())
    while True:
        single, first, second, ground = rng.random(4)
        objects: tuple[int, ...] = (int(first * count),)
        if single >= SINGLE:
            objects += (int(second * count),)
        background = int(ground * len(BACKGROUNDS))
        if len(set(objects)) == len(objects) and is_heldout(objects, background) == (split == "heldout"):
            return objects, background


@cache
def _sprite(index: int) -> Image.Image:
    return Image.fromarray(sprites()[index])


def _place(side: float, placed: list[tuple[float, float, float]], rng: np.random.Generator) -> tuple[float, float]:
    """A centre inside the picture, mostly apart from what is placed: the first of 16 that is, else the farthest."""
    candidates = side / 2 + (SIZE - side) * rng.random((16, 2))
    if not placed:
        return float(candidates[0, 0]), float(candidates[0, 1])
    u, v, other = placed[-1]
    distance = np.hypot(candidates[:, 0] - u, candidates[:, 1] - v)
    apart = np.flatnonzero(distance > 0.45 * (side + other))
    best = candidates[apart[0] if len(apart) else distance.argmax()]
    return float(best[0]), float(best[1])


def draw(objects: tuple[int, ...], background: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One picture (64, 64, 3) uint8 of these objects and its visible masks (2, 64, 64) bool."""
    colour = np.array(list(BACKGROUNDS.values())[background], dtype=np.float32)
    graded, angle, strength = rng.random(3)
    canvas = np.broadcast_to(colour, (SIZE, SIZE, 3)).copy()
    if graded < 0.5:
        ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
        direction = angle * 2 * np.pi
        slope = (np.cos(direction) * ramp[None, :] + np.sin(direction) * ramp[:, None]) / np.sqrt(2)
        canvas *= 1 + (0.1 + 0.2 * strength) * slope[..., None]
    low, high = (34, 50) if len(objects) == 1 else (24, 34)
    placed: list[tuple[float, float, float]] = []
    masks = np.zeros((2, SIZE, SIZE), dtype=bool)
    for slot, item in enumerate(objects):
        scale, tilt, flip = rng.random(3)
        side = low + (high - low) * scale
        x, y = _place(side, placed, rng)
        placed.append((x, y, side))
        tile = _sprite(item).resize((round(side), round(side)), Image.Resampling.LANCZOS)
        if flip < 0.5:
            tile = tile.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tile = tile.rotate((tilt - 0.5) * 50, Image.Resampling.BICUBIC, expand=True)
        layer = Image.new("RGBA", (SIZE, SIZE))
        layer.paste(tile, (round(x - tile.width / 2), round(y - tile.height / 2)))
        pixels = np.asarray(layer, dtype=np.float32)
        alpha = pixels[..., 3:] / 255
        canvas += alpha * (pixels[..., :3] - canvas)
        visible = alpha[..., 0] > 0.5
        masks[:slot] &= ~visible
        masks[slot] = visible
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), masks


def render(seed: int, count: int, split: str = "train", start: int = 0) -> Scenes:
    """Scenes number `start` to `start + count` of a stream."""
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    masks = np.zeros((count, 2, SIZE, SIZE), dtype=bool)
    objects: list[tuple[int, ...]] = []
    background = np.empty(count, dtype=np.int64)
    for row in range(count):
        things, ground = contents(seed, start + row, split)
        rng = np.random.Generator(np.random.PCG64([seed, start + row, 2]))
        images[row], masks[row] = draw(things, ground, rng)
        objects.append(things)
        background[row] = ground
    captions = [caption(things, int(ground)) for things, ground in zip(objects, background, strict=True)]
    return Scenes(images, captions, objects, background, masks)


def render_caption(objects: tuple[int, ...], background: int, seed: int, count: int) -> np.ndarray:
    """(count, 64, 64, 3) uint8: different pictures of one caption, for the variety of real scenes."""
    return np.stack(
        [draw(objects, background, np.random.Generator(np.random.PCG64([seed, row, 3])))[0] for row in range(count)]
    )
