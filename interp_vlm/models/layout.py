"""How Hugging Face image processors lay a picture on the tower's canvas; shared by the families' grid rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from interp_vlm.errors import ModelError
from interp_vlm.tokens.grid import Geometry, ImageGrid

__all__ = ["canvas_of", "edges", "one_row_each", "squared"]


def edges(size: Any) -> dict[str, int]:
    """The entries that an image processor's `size` or `crop_size` really has.

    Example:
        >>> edges({"shortest_edge": 336, "longest_edge": None})
        {'shortest_edge': 336}
    """
    return {name: int(value) for name, value in dict(size).items() if value}


def canvas_of(images: Any, size: tuple[int, int], pixels: tuple[int, int]) -> Geometry:
    """The map from a picture to the tower's pixels through [pad to a square,] resize and centre-crop.

    Args:
        images: an image processor of the CLIP, SigLIP or LLaVA kind.
        size: the picture's (width, height).
        pixels: (width, height) of what the processor really returned: the rule is checked against it.

    Raises:
        ModelError: if the processor's settings do not explain what it returned.
    """
    padded = type(images).__name__.startswith("LlavaImageProcessor") and bool(images.do_pad)
    shape = (max(size), max(size)) if padded else size
    to = _resized(images, shape) if images.do_resize else shape
    geometry = squared(size, to[0]) if padded else Geometry.resize(size, to)
    if getattr(images, "do_center_crop", False):
        cut = edges(images.crop_size)
        left, top = (to[0] - cut["width"]) // 2, (to[1] - cut["height"]) // 2
        geometry = geometry.window(left, top, cut["width"], cut["height"])
    if geometry.canvas != pixels:
        raise ModelError(
            f"{type(images).__name__} turned a picture of {size[0]}x{size[1]} into {pixels[0]}x{pixels[1]} pixels",
            expected=f"{geometry.canvas[0]}x{geometry.canvas[1]} from its settings",
            remedy="give this processor's family a grid rule of its own (docs: how to add a family)",
        )
    return geometry


def squared(size: tuple[int, int], side: int) -> Geometry:
    """The picture in the middle of a square as wide as its longer edge, resized to `side`."""
    longest = max(size)
    scale = side / longest
    offset = (scale * ((longest - size[0]) // 2), scale * ((longest - size[1]) // 2))
    return Geometry(size, (side, side), (scale, scale), offset)


def _resized(images: Any, size: tuple[int, int]) -> tuple[int, int]:
    wanted, (width, height) = edges(images.size), size
    if "height" in wanted and "width" in wanted:
        return wanted["width"], wanted["height"]
    if "shortest_edge" not in wanted or "longest_edge" in wanted:
        raise ModelError(f"an image processor of size {wanted}", expected="height and width, or shortest_edge alone")
    shortest = wanted["shortest_edge"]
    longest = int(shortest * max(size) / min(size))
    return (shortest, longest) if width <= height else (longest, shortest)


def one_row_each(inputs: Mapping[str, Tensor], grids: list[ImageGrid]) -> dict[str, list[int]]:
    """Rows that each picture has in the image tensors, where every tensor has one row per picture."""
    return {name: [1] * len(grids) for name in ("pixel_values", "image_sizes") if name in inputs}
