"""How far attribution patching can be trusted: some cells patched exactly, and how alike the two rank them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm import stats
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.patch import ActivationPatch
from interp_vlm.readouts.metrics import Metric
from interp_vlm.stats.estimate import Estimate
from interp_vlm.tokens import select
from interp_vlm.tokens.selector import Evidence, Selector
from interp_vlm.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["LOW", "Audit", "audited"]

LOW = 0.7
"""Rank correlations below this are called low."""
ENOUGH_EXAMPLES = 5  # fewer cannot be resampled: then the cells are
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Audit:
    """Exact against estimated.

    Attributes:
        cells: one row per cell and example: cell, example, layer, position (and head), estimate, exact.
        spearman: rank correlation over the cells of an example, mean over examples. The interval comes from resampling
            the examples if there are five or more, otherwise the cells.
    """

    cells: pd.DataFrame
    spearman: Estimate

    @property
    def low(self) -> bool:
        """Whether the estimates order the cells badly, or nobody can tell."""
        return not self.spearman.value >= LOW

    def __str__(self) -> str:
        count = self.cells["cell"].nunique()
        if math.isnan(self.spearman.value):
            return f"audit of {count} cells: no rank correlation with exact patching, {self.spearman.reason}"
        said = f"audit of {count} cells: rank correlation with exact patching {self.spearman}"
        return said + (": LOW, do not rely on these estimates" if self.low else "")

    __repr__ = __str__


@dataclass(frozen=True, repr=False)
class _Nth(Selector):
    """One position of another selection: in each example the one with this number."""

    among: Selector
    number: int

    @property
    def needs(self) -> frozenset[str]:
        return self.among.needs

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Int[Tensor, " found"]:
        return self.among.positions(tokens, evidence)[self.number : self.number + 1]

    def __repr__(self) -> str:
        return f"number {self.number} of ({self.among!r})"


def audited(
    vlm: VLM,
    corrupt: Batch,
    patch: ActivationPatch,
    layers: Sequence[int],
    values: Float[Tensor, "example layer pos *head"],
    positions: Int[Tensor, "example pos"],
    metric: Metric,
    count: int,
    seed: int,
) -> Audit:
    """Patch some of the estimated cells exactly, one at a time, with the light-cone engine.

    Args:
        vlm: the model.
        corrupt: the batch that is patched.
        patch: all cells together.
        layers: of the layer axis.
        values: the estimates.
        positions: absolute positions by column, -1 for padding.
        metric: the metric.
        count: how many cells.
        seed: of their choice and of the bootstrap.
    """
    import pandas as pd

    estimates = values.double().cpu().numpy()
    chosen = chosen_cells(estimates, count, seed)
    if not chosen:
        raise InterventionError(
            "no cell to audit: every estimate is 0",
            expected="runs that differ at the cells that are patched, and cells that reach the answer",
        )
    among = select.of(patch.positions)
    patches = [
        ActivationPatch(
            patch.site, [layers[layer]], _Nth(among, column), heads=head or None, source=patch.source, allow_empty=True
        )
        for layer, column, *head in chosen
    ]
    swept = vlm.sweep(corrupt, patches, metric)
    exact = (swept.values - swept.baseline).double().cpu().numpy()
    estimated = np.stack([estimates[(slice(None), *cell)] for cell in chosen])
    there = ~np.isnan(estimated)
    number, example = there.nonzero()
    layer, column, *head = np.asarray(chosen)[number].T
    table: dict[str, Any] = {
        "cell": number,
        "example": example,
        "layer": np.asarray(layers)[layer],
        "position": positions.cpu().numpy()[example, column],
    }
    if head:
        table["head"] = head[0]
    table |= {"estimate": estimated[there], "exact": exact[there]}
    return Audit(pd.DataFrame(table), rank_correlation(estimated, np.where(there, exact, np.nan), seed))


def chosen_cells(
    estimates: Float[np.ndarray, "example layer pos *head"], count: int, seed: int
) -> list[tuple[int, ...]]:
    """Cells (layer, column, and head) to audit: half of them at random from the top, the others one from each of equal
    shares of the remaining ranks.

    The rank is by mean size over examples; the top is the strongest tenth, or as many cells as are taken from it. Cells
    estimated at exactly 0 are left out: there the runs do not differ, or nothing leads to the answer, and agreement on
    them would flatter.
    """
    rng = np.random.default_rng(seed)
    size = np.nan_to_num(np.abs(estimates)).sum(axis=0) / np.maximum(1, (~np.isnan(estimates)).sum(axis=0))
    ranked = np.argsort(-size, axis=None, kind="stable")[: int((size > 0).sum())]
    if count < len(ranked):
        top = min(count - count // 2, len(ranked))
        head = ranked[: max(top, len(ranked) // 10)]
        strongest = rng.choice(head, top, replace=False)
        rest = np.setdiff1d(np.arange(len(ranked)), np.flatnonzero(np.isin(ranked, strongest)))
        spread = [ranked[rng.choice(part)] for part in np.array_split(rest, count - top)] if count > top else []
        ranked = np.concatenate([strongest, np.asarray(spread, dtype=int)])
    return [tuple(map(int, np.unravel_index(cell, size.shape))) for cell in ranked]


def rank_correlation(
    estimated: Float[np.ndarray, "cell example"], exact: Float[np.ndarray, "cell example"], seed: int
) -> Estimate:
    """Spearman's rank correlation over the cells of an example, mean over examples; NaN where a cell is missing.

    Pairs of zeros are left out (where an example's runs do not differ, both must be 0: that is no agreement), and so
    are examples without a rank correlation: fewer than three cells, or cells that are all alike.
    """
    from scipy.stats import rankdata

    def correlation(first: np.ndarray, second: np.ndarray) -> float:
        there = ~np.isnan(first) & ~np.isnan(second) & ((first != 0) | (second != 0))
        if there.sum() < 3:
            return math.nan
        ranks = rankdata(np.stack([first[there], second[there]]), axis=1)
        ranks -= ranks.mean(axis=1, keepdims=True)
        lengths = np.sqrt((ranks**2).sum(axis=1))
        return float(ranks[0] @ ranks[1] / lengths.prod()) if lengths.all() else math.nan

    def over_examples(cells: Bool[np.ndarray, " cell"] | Int[np.ndarray, " drawn"]) -> Float[np.ndarray, " example"]:
        return np.array([correlation(a, b) for a, b in zip(estimated[cells].T, exact[cells].T, strict=True)])

    count = len(estimated)
    each = over_examples(np.arange(count))
    kept = each[~np.isnan(each)]
    n = int((~np.isnan(estimated)).sum())
    if len(kept) == 0:
        reason = "no example has three cells whose values differ"
        return Estimate(math.nan, math.nan, math.nan, n, count, 0.95, "Spearman", seed, reason=reason)
    if len(kept) >= ENOUGH_EXAMPLES:
        found = stats.mean(kept, seed=seed)
        return replace(found, method=f"Spearman, {found.method}")
    rng = np.random.default_rng(seed)
    drawn = [over_examples(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    means = [np.nanmean(one) for one in drawn if not np.isnan(one).all()]
    low, high = np.quantile(means, (0.025, 0.975)) if means else (math.nan, math.nan)
    method = "Spearman, bootstrap over cells (percentile)"
    return Estimate(float(kept.mean()), float(low), float(high), n, count, 0.95, method, seed)
