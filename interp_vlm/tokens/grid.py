"""Where the tokens of one picture lie in that picture: rows, columns and pixel boxes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.tokens.geometry import Geometry

__all__ = ["Geometry", "ImageGrid", "grid_from_geometry", "join_grids", "tower_rows"]

# Boxes thinner than this many original pixels are rounding of the affine map, not part of the picture.
THINNEST = 1e-6


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """Where each image token of one picture lies in the original picture.

    A token without a place (a newline or tile separator, or a patch of pure padding) has a NaN box; separators also
    have cell (-1, -1) and view -1, while padding keeps its cell.

    Attributes:
        rows: of the view of the whole picture (24 for LLaVA-1.5, height / merge for Qwen2-VL).
        cols: of the view of the whole picture.
        size: original picture, (width, height) in pixels, after the EXIF transpose.
        boxes: (n, 4) x0, y0, x1, y1 in original pixels, in token order.
        cells: (n, 2) row and column in the token's view.
        views: (n,) 0 is the whole picture, 1.. number the tiles.
        vision_rows: (n, m) rows of this picture's vision-tower output which feed each token
            (-1 for a token without a place); None when unknown.
        vision_total: how many rows the vision tower gives for this picture; None when unknown.

    Example:
        >>> grid = grid_from_geometry(Geometry.resize((48, 24), (32, 32)), rows=2, cols=2, patch_px=16)
        >>> grid.box_of(3), grid.tokens_in(30, 0, 40, 5).tolist()
        ((24.0, 12.0, 48.0, 24.0), [1])
    """

    rows: int
    cols: int
    size: tuple[int, int]
    boxes: Float[np.ndarray, "n 4"]
    cells: Int[np.ndarray, "n 2"]
    views: Int[np.ndarray, " n"]
    vision_rows: Int[np.ndarray, "n m"] | None = None
    vision_total: int | None = None

    def __post_init__(self) -> None:
        arrays = {
            "boxes": np.array(self.boxes, dtype=np.float64).reshape(-1, 4),
            "cells": np.array(self.cells, dtype=np.int64).reshape(-1, 2),
            "views": np.array(self.views, dtype=np.int64).reshape(-1),
        }
        if self.vision_rows is not None:
            arrays["vision_rows"] = np.array(self.vision_rows, dtype=np.int64)
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"an image grid with {lengths}", expected="one entry per image token in each")
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageGrid):
            return NotImplemented
        if (self.rows, self.cols, self.size, self.n) != (other.rows, other.cols, other.size, other.n):
            return False
        mine, theirs = self.vision_rows, other.vision_rows
        same_rows = mine is theirs if mine is None or theirs is None else np.array_equal(mine, theirs)
        return (
            same_rows
            and np.array_equal(self.boxes, other.boxes, equal_nan=True)
            and np.array_equal(self.cells, other.cells)
            and np.array_equal(self.views, other.views)
        )

    def __hash__(self) -> int:
        return hash((self.rows, self.cols, self.size, self.n))

    def __repr__(self) -> str:
        tiles = len(np.unique(self.views[self.views > 0]))
        more = f" + {tiles} tiles" if tiles else ""
        return f"ImageGrid({self.rows}x{self.cols}{more}, {self.n} tokens, picture {self.size[0]}x{self.size[1]})"

    def __len__(self) -> int:
        return self.n

    @property
    def n(self) -> int:
        """How many image tokens the picture has, those without a place included."""
        return len(self.views)

    @property
    def placed(self) -> np.ndarray:
        """(n,) bool: the tokens that show a part of the picture."""
        return ~np.isnan(self.boxes[:, 0])

    def box_of(self, token: int) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in original pixels of one image token (NaN when it has no place)."""
        if not -self.n <= token < self.n:
            raise SelectionError(f"image token {token} does not exist", expected=f"0 to {self.n - 1}")
        x0, y0, x1, y1 = self.boxes[token].tolist()
        return x0, y0, x1, y1

    def tokens_in(self, x0: float, y0: float, x1: float, y1: float, buffer: int = 0) -> Int[np.ndarray, " found"]:
        """Indices of the image tokens whose box overlaps a rectangle of original pixels.

        Args:
            buffer: also take this many patches on every side, diagonals included (Neo et al., 2410.07149), across
                tile borders. A rectangle that meets no patch stays empty whatever the buffer.
        """
        inside = self._overlapping(x0, y0, x1, y1)
        if buffer and inside.any():
            # The whole view and the tiles differ in patch size, so each scale grows by its own patches.
            for scale in (self.views == 0, self.views > 0):
                if (inside & scale).any():
                    inside |= scale & self._grown(inside & scale, scale, buffer)
        return np.flatnonzero(inside)

    def take(self, index: Sequence[int] | np.ndarray) -> ImageGrid:
        """The grid of a reordered token sequence: `index` holds token numbers, -1 for a token without a place."""
        index = np.asarray(index, dtype=np.int64).reshape(-1)
        blank = index < 0
        source = np.where(blank, 0, index)
        rows = self.vision_rows
        return replace(
            self,
            boxes=np.where(blank[:, None], np.nan, self.boxes[source]),
            cells=np.where(blank[:, None], -1, self.cells[source]),
            views=np.where(blank, -1, self.views[source]),
            vision_rows=None if rows is None else np.where(blank[:, None], -1, rows[source]),
        )

    def _overlapping(self, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
        left, top, right, bottom = self.boxes.T
        with np.errstate(invalid="ignore"):
            return (left < x1) & (right > x0) & (top < y1) & (bottom > y0)

    def _grown(self, inside: np.ndarray, scale: np.ndarray, buffer: int) -> np.ndarray:
        boxes = self.boxes[inside]
        # Patches cut by the picture's edge are smaller than the rest, hence the largest; half a patch less keeps the
        # comparison away from the shared edges.
        width, height = (
            (buffer - 0.5) * np.nanmax(self.boxes[scale, side + 2] - self.boxes[scale, side]) for side in (0, 1)
        )
        (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
        return self._overlapping(x0 - width, y0 - height, x1 + width, y1 + height)


def grid_from_geometry(
    geometry: Geometry,
    rows: int,
    cols: int,
    patch_px: float | tuple[float, float],
    *,
    view: int = 0,
    vision_rows: Int[np.ndarray, "n m"] | None = None,
) -> ImageGrid:
    """The grid of `rows` x `cols` tokens in raster order over the canvas of `geometry`.

    Args:
        patch_px: side of one token in canvas pixels, or (width, height): 14 for LLaVA-1.5, patch x merge for Qwen2-VL.
        view: 0 for the whole picture, 1.. for a tile.
        vision_rows: see `tower_rows`.
    """
    width, height = patch_px if isinstance(patch_px, tuple) else (patch_px, patch_px)
    xs = np.array([geometry.to_picture(col * width, 0)[0] for col in range(cols + 1)])
    ys = np.array([geometry.to_picture(0, row * height)[1] for row in range(rows + 1)])
    row, col = (axis.ravel() for axis in np.indices((rows, cols)))
    boxes = np.stack([xs[col], ys[row], xs[col + 1], ys[row + 1]], axis=1)
    unseen = (boxes[:, 2:] - boxes[:, :2] <= THINNEST).any(axis=1)
    boxes[unseen] = np.nan
    cells, views = np.stack([row, col], axis=1), np.full(rows * cols, view)
    return ImageGrid(rows, cols, geometry.size, boxes, cells, views, vision_rows)


def tower_rows(
    rows: int, cols: int, merge: int = 1, *, start: int = 0, grouped: bool = False
) -> Int[np.ndarray, "n m"]:
    """Which rows of the vision tower's output feed each of `rows` x `cols` tokens, (n, merge * merge).

    Args:
        merge: side of the square of patches pooled or concatenated into one token.
        start: rows before the first patch (1 with a class token; the number of earlier rows for a tile).
        grouped: the tower already puts the patches of a token next to each other (Qwen2-VL), not in raster order.

    Example:
        >>> tower_rows(1, 2, merge=2).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    if grouped:
        return start + np.arange(rows * cols * merge * merge).reshape(-1, merge * merge)
    patches = np.arange(rows * cols * merge * merge).reshape(rows, merge, cols, merge)
    return start + patches.transpose(0, 2, 1, 3).reshape(rows * cols, merge * merge)


def join_grids(parts: Sequence[ImageGrid | int]) -> ImageGrid:
    """One picture's grid from the parts of its token sequence: grids, and ints counting tokens without a place.

    The rows and columns are those of the view of the whole picture, or of the first part where there is none.
    `vision_rows` is kept when every part knows it with the same m.
    """
    grids = [part for part in parts if isinstance(part, ImageGrid)]
    if not grids:
        raise DataError("a picture made of separators alone", expected="at least one grid")
    main = next((grid for grid in grids if (grid.views == 0).any()), grids[0])
    filled = [part if isinstance(part, ImageGrid) else main.take(np.full(part, -1)) for part in parts]
    known = {None if grid.vision_rows is None else grid.vision_rows.shape[1] for grid in filled if grid.n}
    keep = len(known) == 1 and None not in known

    def stacked(name: str) -> np.ndarray:
        return np.concatenate([getattr(grid, name) for grid in filled])

    vision_rows = stacked("vision_rows") if keep else None
    return ImageGrid(main.rows, main.cols, main.size, stacked("boxes"), stacked("cells"), stacked("views"), vision_rows)
