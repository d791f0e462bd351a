"""Digit scenes as plain frozen values, how they are drawn at random, and how they become pixels.

A scene is everything that its picture depends on, the seed of its noise included, so an edited copy
(`dataclasses.replace`) differs in the picture exactly where it was edited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, UInt8

from interp_vlm.data.digit_glyphs import glyph_extents, glyph_indices, glyph_ink

__all__ = [
    "CANVAS",
    "CELL",
    "COLOURS",
    "DIFFICULTIES",
    "POPULAR",
    "Bar",
    "Difficulty",
    "Placed",
    "Scene",
    "draw_scene",
    "render",
    "replace_glyph",
]

CANVAS = 56
"""Side of the square picture in pixels."""

CELL = 8
"""Side of the cells in which digits are centred, in pixels: the patch size of the embedded models."""

COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (0.95, 0.15, 0.15),
        "green": (0.15, 0.85, 0.2),
        "blue": (0.2, 0.35, 1.0),
        "yellow": (0.95, 0.9, 0.15),
        "magenta": (0.9, 0.2, 0.9),
        "cyan": (0.15, 0.9, 0.9),
    }
)
"""The six colours of digits, as RGB in [0, 1]."""

POPULAR: Mapping[int, str] = MappingProxyType({d: tuple(COLOURS)[d % 6] for d in range(10)})
"""The popular colour of each digit: drawn three times as often as each other one, in every split."""

_PAIRS = tuple((digit, colour) for digit in range(10) for colour in COLOURS)
_PAIR_CUMULATIVE = np.cumsum([3.0 if POPULAR[digit] == colour else 1.0 for digit, colour in _PAIRS])
_WINDOW = 26  # the largest digit (16 px, turned, sheared and stretched) spans 25 px
_MARGIN = 8  # a window around the outermost centre (9 px from the edge) stays inside this margin


@dataclass(frozen=True)
class Difficulty:
    """Ranges from which a scene is drawn.

    Attributes:
        objects: smallest and largest number of digits.
        noise: range of the standard deviation of the Gaussian pixel noise, as a share of full brightness.
        bars: largest number of grey bars behind the digits.
        alpha: range of the opacity of a digit.
        description: the same in words.
    """

    objects: tuple[int, int]
    noise: tuple[float, float]
    bars: int
    alpha: tuple[float, float]
    description: str = ""


DIFFICULTIES: Mapping[str, Difficulty] = MappingProxyType(
    {
        "standard": Difficulty(
            (2, 5), (0.02, 0.14), 2, (0.6, 1.0), "2 to 5 digits, noise 0.02 to 0.14, up to 2 bars, opacity 0.6 to 1"
        ),
        "hard": Difficulty(
            (2, 5), (0.1, 0.3), 4, (0.35, 1.0), "2 to 5 digits, noise 0.10 to 0.30, up to 4 bars, opacity 0.35 to 1"
        ),
    }
)
"""The two difficulties: "standard" (seen in training) serves interventions, "hard" (never seen) the prediction of
correctness."""


@dataclass(frozen=True)
class Placed:
    """One handwritten digit on the canvas.

    Attributes:
        digit: 0 to 9.
        colour: a key of `COLOURS`.
        glyph: index of the handwritten glyph in `sklearn.datasets.load_digits`.
        x: centre, in pixels from the left edge.
        y: centre, in pixels from the top edge.
        size: side of the glyph's 8 x 8 square, in pixels.
        rotation: in radians.
        shear: horizontal shear.
        aspect: logarithm of width over height.
        alpha: opacity in [0, 1].
    """

    digit: int
    colour: str
    glyph: int
    x: float
    y: float
    size: float = 14.0
    rotation: float = 0.0
    shear: float = 0.0
    aspect: float = 0.0
    alpha: float = 1.0

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column of the 8 x 8 cell that holds the centre."""
        return int(self.y // CELL), int(self.x // CELL)

    @property
    def affine(self) -> tuple[float, float, float, float]:
        """The matrix (a, b, c, d), by rows, from glyph pixels to canvas pixels."""
        scale, stretch = self.size / 8, math.exp(self.aspect / 2)
        cos, sin = math.cos(self.rotation), math.sin(self.rotation)
        wide, high = scale * stretch, scale / stretch
        return cos * wide, (cos * self.shear - sin) * high, sin * wide, (sin * self.shear + cos) * high

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Pixels (x0, y0, x1, y1) outside which the digit leaves no ink; the last two are exclusive."""
        a, b, c, d = self.affine
        x0, y0, x1, y1 = (float(edge) for edge in glyph_extents()[self.glyph])
        corners = [(x0, y0), (x0, y1), (x1, y0), (x1, y1)]
        columns = [self.x + a * u + b * v for u, v in corners]
        rows = [self.y + c * u + d * v for u, v in corners]
        return (
            max(0, math.floor(min(columns))),
            max(0, math.floor(min(rows))),
            min(CANVAS, math.ceil(max(columns))),
            min(CANVAS, math.ceil(max(rows))),
        )


@dataclass(frozen=True)
class Bar:
    """A grey bar behind the digits: left, top, width and height in pixels, grey in [0, 1]."""

    x: int
    y: int
    width: int
    height: int
    grey: float


@dataclass(frozen=True)
class Scene:
    """Digits, clutter and noise: all that a picture depends on."""

    objects: tuple[Placed, ...]
    bars: tuple[Bar, ...] = ()
    background: float = 0.1
    noise: float = 0.0
    noise_seed: int = 0


def _cells(rng: np.random.Generator, n: int) -> list[tuple[int, int]]:
    """Up to `n` cells of the inner 5 x 5, at least two apart in a row or a column."""
    chosen: list[tuple[int, int]] = []
    for _ in range(20):
        chosen = []
        for k in rng.permutation(25).tolist():
            row, column = 1 + k // 5, 1 + k % 5
            if all(max(abs(row - r), abs(column - c)) >= 2 for r, c in chosen):
                chosen.append((row, column))
                if len(chosen) == n:
                    return chosen
        if n > 5:  # a crowded canvas: as many as fit
            return chosen
    return chosen


def _contents(rng: np.random.Generator, n: int) -> list[tuple[int, str]]:
    """`n` different (digit, colour) pairs; in half of the scenes some digits repeat in other colours."""
    chosen: dict[tuple[int, str], None] = {}
    if n >= 2 and rng.random() < 0.5:
        digit = int(rng.integers(10))
        for colour in rng.permutation(list(COLOURS))[: rng.integers(2, min(4, n) + 1)].tolist():
            chosen[digit, colour] = None
    while len(chosen) < n:
        chosen[_PAIRS[int(np.searchsorted(_PAIR_CUMULATIVE, rng.random() * _PAIR_CUMULATIVE[-1], side="right"))]] = None
    return list(chosen)


def draw_scene(rng: np.random.Generator, split: str, difficulty: Difficulty, *, dense: bool = False) -> Scene:
    """Draw a scene whose glyphs come from one split.

    Args:
        rng: source of every random choice.
        split: "train", "validation" or "test".
        difficulty: the ranges to draw from.
        dense: as many digits as fit (up to 9), for training a vision tower.

    Example:
        >>> scene = draw_scene(np.random.default_rng(0), "test", DIFFICULTIES["standard"])
        >>> 2 <= len(scene.objects) <= 5
        True
    """
    low, high = difficulty.objects
    cells = _cells(rng, 9 if dense else int(rng.integers(low, high + 1)))
    glyphs = glyph_indices(split)
    objects = []
    for (row, column), (digit, colour) in zip(cells, _contents(rng, len(cells)), strict=True):
        jitter = rng.uniform(-1, 1, 6)
        objects.append(
            Placed(
                digit,
                colour,
                glyph=int(glyphs[digit][rng.integers(len(glyphs[digit]))]),
                x=CELL * column + CELL / 2 + 3 * jitter[0],
                y=CELL * row + CELL / 2 + 3 * jitter[1],
                size=14 + 2 * jitter[2],
                rotation=0.17 * jitter[3],
                shear=0.15 * jitter[4],
                aspect=0.1 * jitter[5],
                alpha=float(rng.uniform(*difficulty.alpha)),
            )
        )
    return Scene(
        tuple(objects),
        tuple(_bar(rng) for _ in range(rng.integers(difficulty.bars + 1))),
        background=float(rng.uniform(0.05, 0.2)),
        noise=float(rng.uniform(*difficulty.noise)),
        noise_seed=int(rng.integers(2**31)),
    )


def _bar(rng: np.random.Generator) -> Bar:
    length, thickness = int(rng.integers(12, CANVAS)), int(rng.integers(1, 4))
    width, height = (length, thickness) if rng.random() < 0.5 else (thickness, length)
    x, y = int(rng.integers(CANVAS - width + 1)), int(rng.integers(CANVAS - height + 1))
    return Bar(x, y, width, height, grey=float(rng.uniform(0.25, 0.6)))


def replace_glyph(rng: np.random.Generator, split: str, placed: Placed, digit: int) -> int:
    """The glyph for `placed` once it shows `digit`: its own when the digit stays, else a random one of the split."""
    if digit == placed.digit:
        return placed.glyph
    of_digit = glyph_indices(split)[digit]
    return int(of_digit[rng.integers(len(of_digit))])


def _ink(objects: Sequence[Placed]) -> tuple[Float[np.ndarray, "object 26 26"], list[tuple[int, int]]]:
    """Opacity of each digit in a window, and the window's top left corner on the margined canvas."""
    numbers = np.array([(o.x, o.y, o.alpha, *o.affine) for o in objects], np.float32)
    x, y, alpha, a, b, c, d = numbers.T[:, :, None, None]
    left, top = np.round(x) - _WINDOW // 2, np.round(y) - _WINDOW // 2
    steps = np.arange(_WINDOW, dtype=np.float32) + 0.5
    dx, dy = left + steps[None, None, :] - x, top + steps[None, :, None] - y
    determinant = a * d - b * c
    # 4.5: the centre of an 8-pixel glyph with its border of one, counted in pixel indices
    u = np.clip((d * dx - b * dy) / determinant + 4.5, 0, 9)
    v = np.clip((a * dy - c * dx) / determinant + 4.5, 0, 9)
    column, row = u.astype(np.int32), v.astype(np.int32)
    u, v = u - column, v - row
    ink = glyph_ink().reshape(-1)
    corner = np.array([o.glyph for o in objects], np.int32)[:, None, None] * 121 + row * 11 + column
    upper = ink[corner] * (1 - u) + ink[corner + 1] * u
    lower = ink[corner + 11] * (1 - u) + ink[corner + 12] * u
    opacity = alpha * (upper * (1 - v) + lower * v)
    corners = zip(top.ravel().astype(int).tolist(), left.ravel().astype(int).tolist(), strict=True)
    return opacity, [(t + _MARGIN, s + _MARGIN) for t, s in corners]


def render(scenes: Sequence[Scene]) -> UInt8[np.ndarray, "scene 56 56 3"]:
    """Paint scenes: background, bars, digits in order, noise.

    Returns:
        RGB bytes of shape (scene, row, column, channel).

    Example:
        >>> render([Scene((Placed(7, "red", 7, x=28, y=28),))])[0].max() > 200
        np.True_
    """
    side = CANVAS + 2 * _MARGIN
    canvas = np.empty((len(scenes), side, side, 3), np.float32)
    opacity, corners = (
        _ink([o for scene in scenes for o in scene.objects]) if any(s.objects for s in scenes) else ((), [])
    )
    k = 0
    for picture, scene in zip(canvas, scenes, strict=True):
        picture[:] = scene.background
        for bar in scene.bars:
            top, left = bar.y + _MARGIN, bar.x + _MARGIN
            picture[top : top + bar.height, left : left + bar.width] = bar.grey
        for placed in scene.objects:
            top, left = corners[k]
            window = picture[top : top + _WINDOW, left : left + _WINDOW]
            window += opacity[k][:, :, None] * (np.asarray(COLOURS[placed.colour], np.float32) - window)
            k += 1
    pixels = canvas[:, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    for picture, scene in zip(pixels, scenes, strict=True):
        if scene.noise:
            noise = np.random.default_rng(scene.noise_seed).standard_normal(picture.shape, np.float32)
            picture += np.float32(scene.noise) * noise
    return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
