"""The look of the figures: one colour for a model throughout, room for every label, readable at half a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["MARKERS", "PARTS", "blank", "colours", "dots", "finish", "layers_axis", "line", "places", "reference"]

# Okabe and Ito's palette, told apart with any colour vision.
_MODELS = ("#0072b2", "#d55e00", "#009e73", "#56b4e9", "#e69f00", "#cc79a7", "#000000")
PARTS = ("#000000", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of parts of one model (routes, positions), other than the first models' colours."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "0.45"


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour for each model, in order."""
    return {model: _MODELS[number % len(_MODELS)] for number, model in enumerate(models)}


def blank(height: float, width: float = 5.2) -> tuple[Figure, Axes]:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def places(labels: int, models: int) -> np.ndarray:
    """Where the dot of each model lies on each line of a figure, (model, label)."""
    offsets = (np.arange(models) - (models - 1) / 2) * 0.7 / max(models, 1)
    return np.arange(labels) + offsets[:, None]


def dots(axes: Axes, table: pd.DataFrame, labels: Sequence[str], models: Sequence[str], by: str) -> None:
    """Values with intervals: a line of the figure for each label, on it a dot for each model.

    Args:
        axes: where to draw.
        table: rows with `model`, `value`, `low` and `high`, and the label in column `by`.
        labels: from top to bottom.
        models: from top to bottom within a line.
    """
    painted, at = colours(models), places(len(labels), len(models))
    for number, model in enumerate(models):
        own = table[table["model"] == model].drop_duplicates(by).set_index(by).reindex(list(labels))
        value, low, high = (own[name].to_numpy(dtype=float) for name in ("value", "low", "high"))
        error = np.nan_to_num(np.stack([value - low, high - value])).clip(min=0)
        axes.errorbar(
            value, at[number], xerr=error, fmt=MARKERS[number % len(MARKERS)], color=painted[model], label=model,
            markersize=5, linewidth=1.6,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for edge in range(1, len(labels)):
        axes.axhline(edge - 0.5, color="0.92", linewidth=0.8)


def line(axes: Axes, rows: pd.DataFrame, colour: str, label: str, marker: str = "o", style: str = "-") -> None:
    """Values over layers, with their intervals as a band."""
    rows = rows.sort_values("layer")
    layer, value, low, high = (rows[name].to_numpy(dtype=float) for name in ("layer", "value", "low", "high"))
    axes.plot(layer, value, color=colour, linestyle=style, marker=marker, markersize=4.5, linewidth=1.6, label=label)
    axes.fill_between(layer, low, high, where=np.isfinite(low), color=colour, alpha=0.14, linewidth=0)  # type: ignore[arg-type]


def layers_axis(axes: Axes, n_layers: int, label: str) -> None:
    """Whole layers along x."""
    axes.set_xlim(-0.3, n_layers - 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel(label)


def reference(axes: Axes, value: float, label: str = "", vertical: bool = True) -> None:
    """A dashed line that says what no effect would be."""
    draw = axes.axvline if vertical else axes.axhline
    draw(value, color=_GREY, linestyle="--", linewidth=1, label=label, zorder=1)


def finish(figure: Figure, axes: Axes, columns: int = 4) -> Figure:
    """Put the legend above the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=min(len(labels), columns), frameon=False, fontsize=9,
        handletextpad=0.4, columnspacing=1.2,
    )  # fmt: skip
    return figure
