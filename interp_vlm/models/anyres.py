"""Pictures shown whole and again in tiles without distortion (LLaVA-NeXT, LLaVA-OneVision): which token shows what."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Int

from interp_vlm.models.tiles import Tower
from interp_vlm.tokens.grid import Geometry, ImageGrid, grid_from_geometry, join_grids

__all__ = ["anyres_grid"]


def anyres_grid(
    size: tuple[int, int], pinpoints: list[list[int]], tower: Tower, most_tiles: int | None = None
) -> ImageGrid:
    """The whole picture, then the rows of its tiles with a newline token (without a place) after each.

    Args:
        size: the picture's (width, height).
        pinpoints: the resolutions (height, width) to choose from.
        tower: how a tile is cut into tokens.
        most_tiles: above this many tiles' worth of features they are scaled down (LLaVA-OneVision); then which rows of
            the tower feed a token is not known.
    """
    canvas = _canvas(size, pinpoints)
    parts = tower.tiles(canvas, place=1)
    across, down, side = canvas.canvas[0] // tower.pixels, canvas.canvas[1] // tower.pixels, tower.side
    # tile after tile -> one raster across the tiles, without the rows and columns of padding
    order = np.arange(len(parts) * side**2).reshape(down, across, side, side).transpose(0, 2, 1, 3)
    raster = order.reshape(down * side, across * side)
    raster = raster[_unpadded(size, *raster.shape)]
    tiles = join_grids(list(parts))
    ratio = 0.0 if most_tiles is None else math.sqrt(raster.size / (most_tiles * side**2))
    if ratio > 1.1:
        tiles, raster = _scaled_down(tiles.take(raster.ravel()), *(int(n // ratio) for n in raster.shape))
    lines = np.concatenate([raster, np.full((len(raster), 1), -1)], axis=1)
    grid = join_grids([tower.whole(size, 0), tiles.take(lines.ravel())])
    return replace(grid, vision_total=(1 + len(parts)) * tower.rows)


def _canvas(size: tuple[int, int], pinpoints: list[list[int]]) -> Geometry:
    """The picture in the middle of the resolution that fits it best."""
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    high, wide = select_best_resolution((height, width), pinpoints)
    across, down = wide / width, high / height
    # rounding as `get_patch_output_size` of transformers does
    to = (wide, min(math.ceil(height * across), high)) if across < down else (min(math.ceil(width * down), wide), high)
    return Geometry.resize_pad(size, to, (wide, high))


def _unpadded(size: tuple[int, int], rows: int, cols: int) -> tuple[slice, slice]:
    """What `unpad_image` of the model keeps of a raster of features, rounding as it does."""
    width, height = size
    if width / height > cols / rows:
        padding = (rows - int(round(height * (cols / width), 7))) // 2
        return slice(padding, rows - padding), slice(None)
    padding = (cols - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(padding, cols - padding)


def _scaled_down(tiles: ImageGrid, rows: int, cols: int) -> tuple[ImageGrid, Int[np.ndarray, "rows cols"]]:
    """A raster of features interpolated to fewer rows and columns, as a single view over the same area."""
    x0, y0 = np.nanmin(tiles.boxes[:, :2], axis=0)
    x1, y1 = np.nanmax(tiles.boxes[:, 2:], axis=0)
    scale = (cols / (x1 - x0), rows / (y1 - y0))
    geometry = Geometry(tiles.size, (cols, rows), scale, (-x0 * scale[0], -y0 * scale[1]))
    return grid_from_geometry(geometry, rows, cols, 1, view=1), np.arange(rows * cols).reshape(rows, cols)
