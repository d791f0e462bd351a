"""The patch grid of one picture over the picture itself, as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from interp_vlm.errors import SelectionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from torch import Tensor

    from interp_vlm.tokens.grid import ImageGrid
    from interp_vlm.tokens.token_map import TokenMap

__all__ = ["plot_grid"]

SHAPES = (0.2, 2.0)  # height / width of a picture that is drawn undistorted
NUMBERED = 120  # patches: more than this many numbers cannot be read


def plot_grid(tokens: TokenMap, image: Image | None, number: int, chosen: Tensor | None, tiles: bool) -> Figure:
    """See `TokenMap.plot`."""
    from matplotlib import pyplot

    places = tokens.picture_tokens(number).numpy()
    grid = tokens.grids[number]
    if image is None and number < len(tokens.pictures):
        image = tokens.pictures[number]
    if image is not None and image.size != grid.size:
        raise SelectionError(f"a picture of {image.size} for a grid of {grid.size}", expected="the original picture")
    mask = grid.placed & ((grid.views > 0) if tiles else (grid.views == 0))
    if not mask.any():
        raise SelectionError(
            f"picture {number} has no {'tiles' if tiles else 'view of the whole'}", expected=f"tiles={not tiles}"
        )
    # Made by pyplot, so that notebooks can show it, and closed, so that they show it once.
    figure = pyplot.figure(figsize=_figure_size(*grid.size), layout="constrained")
    pyplot.close(figure)
    axes = figure.add_subplot()
    aspect = "equal" if SHAPES[0] <= grid.size[1] / grid.size[0] <= SHAPES[1] else "auto"
    axes.set_aspect(aspect)
    if image is not None:
        axes.imshow(np.asarray(image.convert("RGB")), extent=(0, grid.size[0], grid.size[1], 0), aspect=aspect)
    marked = mask & np.isin(places, chosen.numpy()) if chosen is not None else np.zeros_like(mask)
    _draw(axes, grid, mask, marked)
    _label(axes, grid, places, mask, tiles)
    tokens_text = f"positions {places[mask].min()}\u2013{places[mask].max()}"
    chosen_text = f", {int(marked.sum())} chosen" if chosen is not None else ""
    axes.set_title(f"{int(mask.sum())} image tokens, {tokens_text}{chosen_text}", fontsize=10)
    return figure


def _figure_size(width: int, height: int) -> tuple[float, float]:
    """Inches: the picture's shape, within what fits a page and stays readable."""
    ratio = min(max(height / width, SHAPES[0]), SHAPES[1])
    wide = 6.0 if ratio <= 1 else 6.0 / ratio
    return wide + 0.5, wide * ratio + 0.7


def _draw(axes: Axes, grid: ImageGrid, mask: np.ndarray, marked: np.ndarray) -> None:
    from matplotlib.collections import PolyCollection

    def corners(chosen: np.ndarray) -> list[np.ndarray]:
        x0, y0, x1, y1 = grid.boxes[chosen].T
        return list(np.stack([np.stack(pair, -1) for pair in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], axis=1))

    width, height = grid.size
    x0, y0, x1, y1 = (*grid.boxes[mask, :2].min(axis=0), *grid.boxes[mask, 2:].max(axis=0))
    for a, b, c, d in ((0, 0, x0, height), (x1, 0, width, height), (x0, 0, x1, y0), (x0, y1, x1, height)):
        axes.fill([a, c, c, a], [b, b, d, d], color="#eeeeee", alpha=0.8, lw=0)  # what the model does not see
    axes.add_collection(PolyCollection(corners(mask), facecolors="none", edgecolors=(0, 0, 0, 0.3), linewidths=1.0))
    axes.add_collection(PolyCollection(corners(mask), facecolors="none", edgecolors=(1, 1, 1, 0.7), linewidths=0.5))
    if marked.any():
        axes.add_collection(
            PolyCollection(corners(marked), facecolors="#d55e0066", edgecolors="#d55e00", linewidths=1.2)
        )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _label(axes: Axes, grid: ImageGrid, places: np.ndarray, mask: np.ndarray, tiles: bool) -> None:
    """Positions in the patches where they can be read; rows and columns at the edges."""
    if mask.sum() <= NUMBERED:
        from matplotlib.patheffects import withStroke

        for i in np.flatnonzero(mask):
            x0, y0, x1, y1 = grid.boxes[i]
            axes.text(
                (x0 + x1) / 2, (y0 + y1) / 2, str(places[i]), ha="center", va="center", color="white", fontsize=7,
                path_effects=[withStroke(linewidth=1.6, foreground="black")],
            )  # fmt: skip
    if tiles:
        axes.set_xlabel("x in pixels")
        axes.set_ylabel("y in pixels")
        return
    for side, count, axis in ((1, grid.cols, axes.xaxis), (0, grid.rows, axes.yaxis)):
        step = max(1, -(-count // 12))
        centres = {
            int(grid.cells[i, side]): float(grid.boxes[i, [1 - side, 3 - side]].mean()) for i in np.flatnonzero(mask)
        }
        cells = [cell for cell in sorted(centres) if cell % step == 0]
        axis.set_ticks([centres[cell] for cell in cells], [str(cell) for cell in cells], fontsize=8)
        axis.set_label_text("row" if side == 0 else "column", fontsize=9)
