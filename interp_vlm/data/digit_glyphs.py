"""The handwritten digits of the digit scenes, split by glyph so that no glyph serves two splits.

Source: UCI "Optical recognition of handwritten digits" (Alpaydin and Kaynak, 1998), as scikit-learn ships it: 1,797
grey 8 x 8 glyphs with ink from 0 to 16.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from interp_vlm.errors import DataError

__all__ = ["SPLITS", "glyph_extents", "glyph_indices", "glyph_ink"]

SPLITS: dict[str, int] = {"train": 1257, "validation": 180, "test": 360}
"""Number of glyphs in each split; the split is stratified by digit with a fixed seed."""

_SPLIT_SEED = 20260508


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return np.asarray(bunch.images, np.float32), np.asarray(bunch.target, np.int64)


@lru_cache(maxsize=1)
def glyph_ink() -> Float[np.ndarray, "glyph 11 11"]:
    """Ink of every glyph in [0, 1], strengthened by 1.3 and clipped, with one empty pixel before it and two after.

    Example:
        >>> glyph_ink().shape
        (1797, 11, 11)
    """
    images, _ = _digits()
    ink = np.pad(np.clip(1.3 * images / 16, 0, 1), ((0, 0), (1, 2), (1, 2)))
    ink.setflags(write=False)
    return ink


@lru_cache(maxsize=1)
def glyph_extents() -> Float[np.ndarray, "glyph 4"]:
    """Support of each glyph under bilinear sampling as (x0, y0, x1, y1), in glyph pixels from the glyph's centre."""
    images, _ = _digits()
    boxes = np.empty((len(images), 4))
    for k, image in enumerate(images > 0):
        columns, rows = np.flatnonzero(image.any(0)), np.flatnonzero(image.any(1))
        boxes[k] = columns[0] - 1, rows[0] - 1, columns[-1] + 1, rows[-1] + 1
    boxes -= 3.5
    boxes.setflags(write=False)
    return boxes


@lru_cache(maxsize=1)
def _split() -> dict[str, tuple[Int[np.ndarray, " glyph"], ...]]:
    from sklearn.model_selection import train_test_split

    _, digits = _digits()
    everything = np.arange(len(digits))
    rest, test = train_test_split(everything, test_size=SPLITS["test"], stratify=digits, random_state=_SPLIT_SEED)
    train, validation = train_test_split(
        rest, test_size=SPLITS["validation"], stratify=digits[rest], random_state=_SPLIT_SEED
    )
    parts = {"train": train, "validation": validation, "test": test}
    return {name: tuple(np.sort(part[digits[part] == d]) for d in range(10)) for name, part in parts.items()}


def glyph_indices(split: str) -> tuple[Int[np.ndarray, " glyph"], ...]:
    """Indices of the glyphs of a split in scikit-learn's order, one array for each digit 0 to 9.

    Raises:
        DataError: if there is no such split.

    Example:
        >>> sum(len(of_digit) for of_digit in glyph_indices("test"))
        360
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} does not exist", expected=", ".join(SPLITS), remedy="choose one of them")
    return _split()[split]
