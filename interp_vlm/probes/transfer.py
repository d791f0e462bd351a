"""Transfer: does what a probe learns on one kind of question, or one data set, hold on another?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from interp_vlm.errors import DataError
from interp_vlm.probes import measures
from interp_vlm.probes.folds import assign
from interp_vlm.probes.inputs import read, read_columns
from interp_vlm.probes.logistic import C_PATH
from interp_vlm.probes.nested import score_fold
from interp_vlm.stats import Estimate
from interp_vlm.stats.inputs import as_classes, as_groups, check_level, check_resamples

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["TransferReport", "probe_transfer"]


@dataclass(frozen=True, eq=False)
class TransferReport:
    """Probes fitted on each kind and tested on every kind, on pictures not seen in fitting.

    Attributes:
        kinds: names of the kinds (or data sets).
        layers: the layers probed.
        auroc: per (fitted on, tested on), one estimate a layer.
        headline: per (fitted on, tested on), with the layer chosen on the inner folds of the kind fitted on.
        scores: out-of-fold logits of every example from the probe fitted on each kind.
        labels: True where the answer is right.
        kind: number of each example's kind.
        position: "before_answer" or "after_answer".
        seed: of folds and bootstrap.
    """

    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    auroc: dict[tuple[str, str], tuple[Estimate, ...]]
    headline: dict[tuple[str, str], Estimate]
    scores: Float[np.ndarray, "kind layer example"]
    labels: Bool[np.ndarray, " example"]
    kind: Int[np.ndarray, " example"]
    position: str
    seed: int

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row for each pair of kinds and layer."""
        import pandas as pd

        rows = [
            (fitted, tested, layer, estimate.value, estimate.low, estimate.high, estimate.n)
            for (fitted, tested), estimates in self.auroc.items()
            for layer, estimate in zip(self.layers, estimates, strict=True)
        ]
        names = ("fitted_on", "tested_on", "layer", "auroc", "low", "high", "n")
        return pd.DataFrame(rows, columns=pd.Index(names))

    def plot(self, ax: Any = None) -> Figure:
        """The headline AUROC of every pair as a heat map."""
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(4.8, 4.0), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        grid = np.array([[self.headline[fitted, tested].value for tested in self.kinds] for fitted in self.kinds])
        image = axes.imshow(grid, vmin=0.0, vmax=1.0, cmap="RdBu")
        for (y, x), value in np.ndenumerate(grid):
            axes.text(
                x, y, f"{value:.2f}", ha="center", va="center", color="white" if abs(value - 0.5) > 0.3 else "black"
            )
        axes.set_xticks(range(len(self.kinds)), self.kinds)
        axes.set_yticks(range(len(self.kinds)), self.kinds)
        axes.set(xlabel="tested on", ylabel="fitted on")
        figure.colorbar(image, ax=axes, label="AUROC")
        if ax is None:
            pyplot.close(figure)
        return figure

    def __repr__(self) -> str:
        pairs = "; ".join(f"{fitted} -> {tested} {estimate}" for (fitted, tested), estimate in self.headline.items())
        return f"TransferReport({pairs})"


def probe_transfer(
    activations: Any,
    labels: ArrayLike | None,
    groups: ArrayLike | Sequence[Any] | None,
    kinds: Sequence[Hashable],
    *,
    position: str | None = None,
    position_index: int | None = None,
    site: str | None = None,
    layers: Sequence[int] | None = None,
    C: Sequence[float] = C_PATH,
    folds: int = 5,
    inner_folds: int = 4,
    standardise: bool = True,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> TransferReport:
    """Fit an L2 probe on each kind and test it on every kind, under one cross-validation grouped by picture.

    Kinds of question often share pictures: a picture of the test part is in no training part, of whatever kind. Pairs
    of one kind with itself are ordinary nested cross-validation, so that all cells of the table compare.

    Args:
        activations: (n, layer, d) of all kinds together, a `Cache` with one position of each example, or a store.
        labels: (n,) booleans; of a store, None takes its own labels, and so for the groups.
        groups: (n,) pictures; different data sets need different names.
        kinds: (n,) the kind or data set of each example.
        position: see `probe_layers`; so are the other options.

    Raises:
        DataError: fewer than two kinds, a kind with one class or too few groups, and all that `probe_layers` refuses.
    """
    check_level(level)
    check_resamples(resamples)
    found = read(activations, site, layers, position, position_index)
    n = len(found)
    known = read_columns(activations, labels=labels, groups=groups)
    right = as_classes(known["labels"], "labels", n)
    codes, _ = as_groups(known["groups"], n)
    if len(kinds) != n:
        raise DataError(f"kinds has {len(kinds)} values", expected=f"{n}, one for each example")
    names = tuple(dict.fromkeys(kinds))
    kind = np.array([names.index(value) for value in kinds], dtype=np.intp)
    if len(names) < 2:
        raise DataError(f"kinds holds {len(names)} kind", expected="at least 2", remedy="use probe_layers for one")
    for number, name in enumerate(names):
        for value in (True, False):
            holding = len(np.unique(codes[(kind == number) & (right == value)]))
            if holding < max(folds, inner_folds + 1):
                raise DataError(
                    f"label {value} of kind {name!r} is found in {holding} groups",
                    expected=f"at least {max(folds, inner_folds + 1)}",
                    remedy="add examples of that class, or ask for fewer folds",
                )
    outer = assign(right + 2 * kind, codes, folds, seed)
    scores, inner_auroc = np.empty((len(names), len(found.layers), n)), np.empty((len(names), len(found.layers), folds))
    for index, number in enumerate(found.layers):
        values = found.layer(number)
        for source in range(len(names)):
            for fold in range(folds):
                train, test = np.flatnonzero((outer != fold) & (kind == source)), np.flatnonzero(outer == fold)
                inner = assign(right[train], codes[train], inner_folds, seed)
                target = right[train, None].astype(np.float64)
                result = score_fold(values[train], values[test], target, inner, C, standardise=standardise)
                scores[source, index, test] = result.test[:, 0]
                inner_auroc[source, index, fold] = result.inner_auroc[0]
        del values  # before the next layer comes

    def measured(source: int, tested: int, index: np.ndarray) -> Estimate:
        """AUROC on one kind from the layers `index` gives to each of its examples."""
        rows = np.flatnonzero(kind == tested)
        mine, _ = as_groups(codes[rows], len(rows))
        chosen = scores[source, index[rows], rows]
        return measures.auroc(chosen, right[rows], outer[rows], mine, level=level, resamples=resamples, seed=seed)

    auroc, headline = {}, {}
    for source, fitted in enumerate(names):
        best = np.argmax(np.nan_to_num(inner_auroc[source], nan=0.5), axis=0)[outer]
        for tested, name in enumerate(names):
            pair = (str(fitted), str(name))
            auroc[pair] = tuple(measured(source, tested, np.full(n, index)) for index in range(len(found.layers)))
            headline[pair] = measured(source, tested, best)
    return TransferReport(
        tuple(map(str, names)), found.layers, auroc, headline, scores, right, kind, found.position, seed
    )
