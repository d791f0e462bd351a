"""Pictures cut into tiles as large as the tower's square, with the whole picture beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from interp_vlm.tokens.grid import Geometry, ImageGrid, grid_from_geometry, join_grids, tower_rows

__all__ = ["Tower", "tiled_grid"]


@dataclass(frozen=True)
class Tower:
    """How a vision tower cuts one square into tokens.

    Attributes:
        pixels: side of the square.
        patch: side of a patch; what is left over at the right and bottom edge is not seen.
        merge: side of the square of patches that makes one token.
        classes: tokens before the patches.
    """

    pixels: int
    patch: int
    merge: int = 1
    classes: int = 0

    @property
    def side(self) -> int:
        """Tokens along one side."""
        return self.pixels // self.patch // self.merge

    @property
    def rows(self) -> int:
        """Rows of the tower's output for one square."""
        return self.classes + (self.side * self.merge) ** 2

    def view(self, geometry: Geometry, number: int, place: int) -> ImageGrid:
        """The grid of one square: view `number` of its picture, the tower's output number `place`."""
        feeding = tower_rows(self.side, self.side, self.merge, start=place * self.rows + self.classes)
        patch = self.patch * self.merge
        return grid_from_geometry(geometry, self.side, self.side, patch, view=number, vision_rows=feeding)

    def whole(self, size: tuple[int, int], place: int) -> ImageGrid:
        """The whole picture stretched to one square."""
        return self.view(Geometry.resize(size, (self.pixels, self.pixels)), 0, place)

    def tiles(self, canvas: Geometry, place: int) -> list[ImageGrid]:
        """The squares of a canvas in raster order, views 1 and up, from the tower's output number `place` on."""
        across, down = (side // self.pixels for side in canvas.canvas)
        corners = [(col * self.pixels, row * self.pixels) for row, col in np.ndindex(down, across)]
        return [
            self.view(canvas.window(left, top, self.pixels, self.pixels), k + 1, place + k)
            for k, (left, top) in enumerate(corners)
        ]


def tiled_grid(size: tuple[int, int], tiles: tuple[int, int], tower: Tower) -> ImageGrid:
    """The picture stretched to `tiles` (rows, columns) of squares, then the whole (InternVL, Idefics 3, SmolVLM).

    One tile or none is the whole picture alone.
    """
    down, across = tiles
    if down * across <= 1:
        return replace(tower.whole(size, 0), vision_total=tower.rows)
    parts = tower.tiles(Geometry.resize(size, (across * tower.pixels, down * tower.pixels)), 0)
    whole = tower.whole(size, len(parts))
    return replace(join_grids([*parts, whole]), vision_total=(len(parts) + 1) * tower.rows)
