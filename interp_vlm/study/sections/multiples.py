"""Small multiples: the same axes once for each model."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["multiples"]

_COLUMNS = 3


def multiples(models: Sequence[str], height: float = 2.6) -> tuple[Figure, dict[str, Axes]]:
    """An empty figure with axes of one scale for each model, three in a row.

    Args:
        models: in order; each heads its axes.
        height: of a row, in inches; the legend comes on top.
    """
    columns = min(_COLUMNS, len(models))
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(max(5.2, 2.6 * columns), 0.7 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    found = {}
    for number, axes in enumerate(grid.flat):
        if number >= len(models):
            axes.remove()
            continue
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(models[number], fontsize=10)
        axes.tick_params(labelbottom=number + columns >= len(models))
        found[models[number]] = axes
    return figure, found
