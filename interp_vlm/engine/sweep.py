"""Sweeps: many interventions on the same examples, one number per intervention and example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import Intervention, brief

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_vlm.engine.receipts import Receipt

__all__ = ["Sweep"]


@dataclass(frozen=True, eq=False)
class Sweep:
    """The result of a sweep.

    Attributes:
        interventions: what was run, in the order asked; each entry a single intervention or a tuple run together.
        values: the metric, (intervention, example).
        baseline: the metric of the run without interventions, (example,).
        metric: its name.
        receipts: per intervention, its receipts in every batch.
    """

    interventions: tuple[tuple[Intervention, ...], ...]
    values: Float[Tensor, "intervention example"]
    baseline: Float[Tensor, " example"]
    metric: str
    receipts: tuple[tuple[Receipt, ...], ...]

    @property
    def varied(self) -> list[str]:
        """The fields in which the (first) interventions differ, in the order of their fields."""
        firsts = [group[0] for group in self.interventions]
        names = list(dict.fromkeys(name for value in firsts for name in value._fields()))
        texts = {name: {_label(value._fields().get(name)) for value in firsts} for name in names}
        return [name for name in names if len(texts[name]) > 1]

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row per intervention and example, with the varied fields, the value and the baseline."""
        import pandas as pd

        n_interventions, n_examples = self.values.shape
        columns: dict[str, Any] = {"intervention": np.repeat(np.arange(n_interventions), n_examples)}
        for name in self.varied:
            labels = [_label(group[0]._fields().get(name)) for group in self.interventions]
            columns[name] = np.repeat(np.asarray(labels, dtype=object), n_examples)
        columns["example"] = np.tile(np.arange(n_examples), n_interventions)
        columns[self.metric] = self.values.double().cpu().numpy().ravel()
        columns["baseline"] = np.tile(self.baseline.double().cpu().numpy(), n_interventions)
        return pd.DataFrame(columns)

    def plot(self, ax: Any = None) -> Figure:
        """The mean over examples: a line over one varied field, a heat map over two.

        Raises:
            InterventionError: when more than two fields vary; use `frame()` then.
        """
        from matplotlib import pyplot

        varied = self.varied
        if len(varied) > 2:
            raise InterventionError(
                f"the sweep varies {', '.join(varied)}",
                expected="at most two fields to plot",
                remedy="plot .frame() instead",
            )
        # Made by pyplot, so that notebooks can show it, and closed, so that they show it once.
        figure = pyplot.figure(figsize=(6.4, 3.6), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        means = self.values.double().mean(1).cpu().numpy()
        (_heat if len(varied) == 2 else _line)(axes, self, means)
        if ax is None:
            pyplot.close(figure)
        return figure

    def _means(self) -> pd.DataFrame:
        keys = ["intervention", *self.varied]
        means: Any = self.frame().groupby(keys, sort=False, as_index=False)[[self.metric, "baseline"]].mean()
        return means

    def __len__(self) -> int:
        return len(self.interventions)

    def __repr__(self) -> str:
        over = f" over {', '.join(self.varied)}" if self.varied else ""
        return f"Sweep({len(self)} interventions x {self.values.shape[1]} examples of {self.metric}{over})"

    def _repr_html_(self) -> str:
        table = self._means()
        return f"<p>{self!r}</p>{table.head(20).to_html(index=False, float_format='{:.4g}'.format, border=0)}"


def _label(value: Any) -> str:
    """A field's value as one short word: a window of layers by its ends."""
    if isinstance(value, range) and len(value) > 0 and value.step == 1:
        return str(value[0]) if len(value) == 1 else f"{value[0]}-{value[-1]}"
    if isinstance(value, list | tuple) and len(value) == 1:
        return str(value[0])
    return value if isinstance(value, str) else brief(value)


def _line(axes: Any, sweep: Sweep, means: np.ndarray) -> None:
    labels = [_label(group[0]._fields().get(sweep.varied[0])) if sweep.varied else "" for group in sweep.interventions]
    places = np.arange(len(means))
    axes.plot(places, means, marker="o", markersize=4, label="with intervention")
    axes.axhline(float(sweep.baseline.double().mean()), color="0.4", linestyle="--", linewidth=1, label="without")
    step = max(1, len(labels) // 16)
    axes.set_xticks(places[::step], labels[::step], rotation=45 if max(map(len, labels)) > 4 else 0)
    axes.set(xlabel=sweep.varied[0] if sweep.varied else "", ylabel=f"mean {sweep.metric}")
    axes.legend(frameon=False, fontsize="small")


def _heat(axes: Any, sweep: Sweep, means: np.ndarray) -> None:
    rows, columns = sweep.varied
    pairs = [tuple(_label(group[0]._fields().get(name)) for name in (rows, columns)) for group in sweep.interventions]
    ys, xs = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1))
    grid = np.full((len(ys), len(xs)), np.nan)
    for (y, x), value in zip(pairs, means, strict=True):
        grid[ys.index(y), xs.index(x)] = value
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(xs)), xs, rotation=45 if max(map(len, xs)) > 4 else 0)
    axes.set_yticks(range(len(ys)), ys)
    axes.set(xlabel=columns, ylabel=rows)
    axes.figure.colorbar(image, ax=axes, label=f"mean {sweep.metric}", pad=0.03)
    if grid.size <= 64:
        middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
        for (y, x), value in np.ndenumerate(grid):
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", color="white" if value < middle else "black")
