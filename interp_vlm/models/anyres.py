"""Pictures shown whole and again in tiles (LLaVA-NeXT, LLaVA-OneVision): which token shows what."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from interp_vlm.tokens.grid import Geometry, ImageGrid, grid_from_geometry, join_grids, tower_rows

__all__ = ["anyres_grid"]


def anyres_grid(size: tuple[int, int], config: Any, classes: int, most_tiles: int | None = None) -> ImageGrid:
    """The whole picture, then the rows of its tiles with a newline token (without a place) after each.

    Args:
        size: the picture's (width, height).
        config: the model's configuration, with its tower and the resolutions to choose from.
        classes: tokens of the tower before its patches.
        most_tiles: above this many tiles' worth of features they are scaled down (LLaVA-OneVision); then which rows of
            the tower feed a token is not known.
    """
    pixels, patch = config.vision_config.image_size, config.vision_config.patch_size
    side = pixels // patch
    feeding = tower_rows(side, side, start=classes)
    whole = grid_from_geometry(Geometry.resize(size, (pixels, pixels)), side, side, patch, vision_rows=feeding)
    tiles, n_tiles = _tiles(size, config.image_grid_pinpoints, pixels, patch, classes)
    ratio = 0.0 if most_tiles is None else math.sqrt(tiles.n / (most_tiles * side**2))
    if ratio > 1.1:
        tiles = _scaled_down(tiles, int(tiles.rows // ratio), int(tiles.cols // ratio))
    lines = np.arange(tiles.n).reshape(tiles.rows, tiles.cols)
    ended = np.concatenate([lines, np.full((tiles.rows, 1), -1)], axis=1)
    # of a very thin picture nothing but the newlines may be left
    seen = tiles.take(ended.ravel()) if tiles.n else tiles.rows
    return replace(join_grids([whole, seen]), vision_total=(1 + n_tiles) * (classes + side * side))


def _tiles(
    size: tuple[int, int], pinpoints: list[list[int]], pixels: int, patch: int, classes: int
) -> tuple[ImageGrid, int]:
    """The tiles of the best-fitting resolution as one raster without the rows and columns of padding; their number.

    `cells` and `views` name place and tile; `vision_rows` counts the rows of the whole view and the earlier tiles.
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
    tiles = replace(raster.take(kept.ravel()), rows=kept.shape[0], cols=kept.shape[1])
    return tiles, (rows // side) * (cols // side)


def _unpadded(size: tuple[int, int], rows: int, cols: int) -> tuple[slice, slice]:
    """What `unpad_image` of the model keeps of a raster of features, rounding as it does."""
    width, height = size
    if width / height > cols / rows:
        padding = (rows - int(round(height * (cols / width), 7))) // 2
        return slice(padding, rows - padding), slice(None)
    padding = (cols - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(padding, cols - padding)


def _scaled_down(tiles: ImageGrid, rows: int, cols: int) -> ImageGrid:
    """The raster of tiles interpolated to fewer rows and columns, as a single view over the same area."""
    boxes = tiles.boxes
    x0, y0 = np.nanmin(boxes[:, :2], axis=0)
    x1, y1 = np.nanmax(boxes[:, 2:], axis=0)
    scale = (cols / (x1 - x0), rows / (y1 - y0))
    geometry = Geometry(tiles.size, (cols, rows), scale, (-x0 * scale[0], -y0 * scale[1]))
    return grid_from_geometry(geometry, rows, cols, 1, view=1)
