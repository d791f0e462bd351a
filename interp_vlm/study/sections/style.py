"""The look of the figures: one colour for a model throughout, room for every label, readable at half a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["MARKERS", "blank", "colours", "dots", "finish", "layers_axis", "line"]

# Okabe and Ito's palette, told apart with any colour vision.
_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "0.45"
WIDTH = 5.2


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in order."""
    return {name: _PALETTE[number % len(_PALETTE)] for number, name in enumerate(names)}


def blank(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def dots(axes: Axes, table: pd.DataFrame, labels: Sequence[str], names: Sequence[str], by: str, of: str = "model") -> None:
    """Values with intervals: a line of the figure for each label, in it a dot for each name.

    Args:
        axes: where to draw.
        table: rows with `value`, `low`, `high`, the label in column `by` and the name in column `of`.
        labels: from top to bottom.
        names: in their own colours.
    """
    painted = colours(names)
    step = 0.7 / max(len(names), 1)
    for number, name in enumerate(names):
        own = table[table[of] == name].drop_duplicates(by).set_index(by).reindex(labels)
        y = np.arange(len(labels)) + (number - (len(names) - 1) / 2) * step
        value = own["value"].to_numpy(dtype=float)
        error = np.nan_to_num(np.abs(np.stack([value - own["low"], own["high"] - value]).astype(float)))
        axes.errorbar(
            value, y, xerr=error, fmt=MARKERS[number % len(MARKERS)], color=painted[name], label=name,
            markersize=5, linewidth=1.6, capsize=0,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for edge in range(1, len(labels)):
        axes.axhline(edge - 0.5, color="0.92", linewidth=0.8)


def line(axes: Axes, rows: pd.DataFrame, colour: str, label: str, marker: str = "o", style: str = "-") -> None:
    """Values over layers, with their intervals as a band."""
    rows = rows.sort_values("layer")
    x, value = rows["layer"].to_numpy(dtype=float), rows["value"].to_numpy(dtype=float)
    low, high = (rows[name].to_numpy(dtype=float) for name in ("low", "high"))
    axes.plot(x, value, color=colour, linestyle=style, marker=marker, markersize=4.5, linewidth=1.6, label=label)
    axes.fill_between(x, low, high, where=~np.isnan(low).astype(bool), color=colour, alpha=0.15, linewidth=0)


def layers_axis(axes: Axes, n_layers: int, label: str) -> None:
    """Whole layers along x."""
    axes.set_xlim(-0.3, n_layers - 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel(label)


def reference(axes: Axes, value: float, label: str, vertical: bool = True) -> None:
    """A dashed line that says what no effect would be."""
    draw = axes.axvline if vertical else axes.axhline
    draw(value, color=_GREY, linestyle="--", linewidth=1, label=label, zorder=1)


def finish(figure: Figure, axes: Axes, columns: int | None = None, **options: Any) -> Figure:
    """Put the legend above the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=columns or min(len(labels), 4), frameon=False,
            fontsize=9, handletextpad=0.4, columnspacing=1.2, **options,
        )  # fmt: skip
    return figure
