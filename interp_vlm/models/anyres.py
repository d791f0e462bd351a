"""Pictures shown whole and again in tiles (LLaVA-NeXT, LLaVA-OneVision): which token shows what."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from interp_vlm.tokens.grid import Geometry, ImageGrid, grid_from_geometry, tower_rows

__all__ = ["tiles_grid", "whole_grid"]


def whole_grid(size: tuple[int, int], pixels: int, patch: int, classes: int) -> ImageGrid:
    """The whole picture stretched to the tower's square: the first of its views.

    Args:
        size: the picture's (width, height).
        pixels: side of the tower's square.
        patch: side of a patch.
        classes: tokens of the tower before its patches.
    """
    side = pixels // patch
    feeding = tower_rows(side, side, start=classes)
    return grid_from_geometry(Geometry.resize(size, (pixels, pixels)), side, side, patch, vision_rows=feeding)


def tiles_grid(size: tuple[int, int], pinpoints: list[list[int]], pixels: int, patch: int, classes: int) -> ImageGrid:
    """The tiles of the best-fitting resolution as one raster, rows and columns of padding left out.

    Its tokens are in raster order across tiles, without line breaks; `cells` and `views` name place and tile, and
    `vision_rows` counts the rows of the whole view and the earlier tiles.
    """
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    high, wide = select_best_resolution((height, width), pinpoints)
    across, down = wide / width, high / height
    # rounding as `get_patch_output_size` of transformers does
    to = (wide, min(math.ceil(height * across), high)) if across < down else (min(math.ceil(width * down), wide), high)
    geometry = Geometry.resize_pad(size, to, (wide, high))
    rows, cols, side = high // patch, wide // patch, pixels // patch
    raster = grid_from_geometry(geometry, rows, cols, patch, view=1)
    row, col = raster.cells.T
    tile = row // side * (cols // side) + col // side
    place = row % side * side + col % side
    raster = replace(
        raster,
        cells=np.stack([row % side, col % side], axis=1),
        views=tile + 1,
        vision_rows=((tile + 1) * (classes + side * side) + classes + place)[:, None],
    )
    kept = np.arange(rows * cols).reshape(rows, cols)[_unpadded(size, rows, cols)]
    return replace(raster.take(kept.ravel()), rows=kept.shape[0], cols=kept.shape[1])


def _unpadded(size: tuple[int, int], rows: int, cols: int) -> tuple[slice, slice]:
    """What `unpad_image` of the model keeps of a raster of features, rounding as it does."""
    width, height = size
    if width / height > cols / rows:
        padding = (rows - int(round(height * (cols / width), 7))) // 2
        return slice(padding, rows - padding), slice(None)
    padding = (cols - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(padding, cols - padding)
