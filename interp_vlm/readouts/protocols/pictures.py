"""Which examples are about the same picture: the unit in which they are resampled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from interp_vlm.tokens.batch import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["picture_numbers", "pixels"]


def pixels(pictures: Sequence[Image]) -> str:
    """A fingerprint of an example's pictures: their sizes and pixels."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(f"{picture.mode} {picture.size} ".encode() + picture.tobytes())
    return digest.hexdigest()


def picture_numbers(batches: Sequence[Batch]) -> tuple[int, ...]:
    """For each example the number of its picture, counted in the order in which pictures first appear."""
    seen: dict[str, int] = {}
    return tuple(seen.setdefault(pixels(own), len(seen)) for batch in batches for own in batch.images)
