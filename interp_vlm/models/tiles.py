"""Pictures stretched to whole tiles, with the whole picture among them (InternVL, Idefics 3, SmolVLM)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from interp_vlm.tokens.grid import Geometry, ImageGrid, grid_from_geometry, join_grids, tower_rows

__all__ = ["tiled_grid"]


def tiled_grid(
    size: tuple[int, int], tiles: tuple[int, int], pixels: int, patch: int, merge: int, classes: int
) -> ImageGrid:
    """The tiles in raster order, then the whole picture; without tiles the whole picture alone.

    Args:
        size: the picture's (width, height).
        tiles: rows and columns of tiles; one tile or none is the whole picture.
        pixels: side of a tile, and of the whole picture, as the tower sees them.
        patch: side of a patch.
        merge: side of the square of patches that makes one token.
        classes: tokens of the tower before its patches.
    """
    side, (down, across) = pixels // patch // merge, tiles
    each = classes + (side * merge) ** 2
    n = down * across if down * across > 1 else 0

    def view(geometry: Geometry, number: int, place: int) -> ImageGrid:
        feeding = tower_rows(side, side, merge, start=place * each + classes)
        return grid_from_geometry(geometry, side, side, patch * merge, view=number, vision_rows=feeding)

    full = Geometry.resize(size, (max(across, 1) * pixels, max(down, 1) * pixels))
    parts: list[ImageGrid | int] = [
        view(full.window(col * pixels, row * pixels, pixels, pixels), k + 1, k)
        for k, (row, col) in enumerate(np.ndindex(down, across) if n else ())
    ]
    parts.append(view(Geometry.resize(size, (pixels, pixels)), 0, n))
    return replace(join_grids(parts), vision_total=(n + 1) * each)
