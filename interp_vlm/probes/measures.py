"""How good out-of-fold scores are: measures whose pairs and ranks stay within one outer fold, with group bootstraps.

Scores of different folds come from different fits. Comparing them across folds biases the AUROC downwards (a fold with
more positives leaves fewer to its training part, so that its intercept is lower; with nothing to find, the pooled AUROC
falls below 0.5). Pairs of one fold are compared alone, and folds are weighted by their pairs.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool, Float, Int

from interp_vlm import stats
from interp_vlm.stats import Estimate
from interp_vlm.stats.bootstrap import auroc_statistic
from interp_vlm.stats.resampling import draws, estimate

__all__ = [
    "auroc",
    "auroc_draws",
    "auroc_statistic",
    "average_precision",
    "brier",
    "fold_auroc",
    "onset",
    "reliability",
]

ONSET = 0.9  # of the way from chance to the peak


def fold_auroc(
    scores: Float[np.ndarray, "example column"], labels: np.ndarray, folds: Int[np.ndarray, " example"]
) -> Float[np.ndarray, " column"]:
    """AUROC of each column over pairs of one fold, ties counting half; NaN where no fold has both classes.

    Args:
        scores: one column a layer, C or permutation.
        labels: (example,) or (example, column) booleans.
        folds: the outer fold in which each example was tested.
    """
    from scipy.stats import rankdata

    labels = np.broadcast_to(labels[:, None] if labels.ndim == 1 else labels, scores.shape)
    wins, pairs = np.zeros(scores.shape[1]), np.zeros(scores.shape[1])
    for fold in np.unique(folds):
        rows = folds == fold
        true = labels[rows]
        positives = true.sum(0).astype(np.float64)
        wins += (rankdata(scores[rows], axis=0) * true).sum(0) - positives * (positives + 1.0) / 2.0
        pairs += positives * (len(true) - positives)
    return np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)


def auroc(
    scores: Float[np.ndarray, " example"],
    labels: Bool[np.ndarray, " example"],
    folds: Int[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> Estimate:
    """AUROC within folds and its interval; groups are drawn, the fits are kept."""
    return stats.auroc(scores, labels, codes, strata=folds, level=level, resamples=resamples, seed=seed)


def average_precision(
    scores: Float[np.ndarray, " example"],
    labels: Bool[np.ndarray, " example"],
    folds: Int[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> Estimate:
    """Average precision within each fold, folds weighted by their positives, with its interval."""
    parts = []
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        rows = rows[np.argsort(-scores[rows], kind="stable")]
        last = np.searchsorted(-scores[rows], -scores[rows], side="right") - 1  # the end of each run of ties
        true = np.flatnonzero(labels[rows])
        parts.append((codes[rows], labels[rows].astype(np.float64), true, last[true]))

    def statistic(drawn: np.ndarray) -> np.ndarray:
        top, bottom = np.zeros(len(drawn)), np.zeros(len(drawn))
        for members, is_true, true, ends in parts:
            weights = drawn[:, members]
            hits, seen = np.cumsum(weights * is_true, axis=1)[:, ends], np.cumsum(weights, axis=1)[:, ends]
            precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
            top += (weights[:, true] * precision).sum(axis=1)
            bottom += weights[:, true].sum(axis=1)
        return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)

    groups = int(codes.max()) + 1
    return estimate(statistic, len(scores), groups, level, resamples, seed, width=len(scores))


def brier(
    scores: Float[np.ndarray, " example"],
    labels: Bool[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"],
    *,
    level: float,
    resamples: int,
    seed: int,
) -> Estimate:
    """Mean squared difference of the probability (of these logits) from the outcome, with its interval."""
    from scipy.special import expit

    return stats.mean((expit(scores) - labels) ** 2, codes, level=level, resamples=resamples, seed=seed)


def auroc_draws(
    scores: Float[np.ndarray, "layer example"],
    labels: Bool[np.ndarray, " example"],
    folds: Int[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"],
    *,
    resamples: int,
    seed: int,
) -> Float[np.ndarray, "resample layer"]:
    """AUROC of every layer in the same resamples of groups, for what depends on the whole curve."""
    groups, width = int(codes.max()) + 1, scores.shape[1]
    curves = (auroc_statistic(layer, labels, folds, codes) for layer in scores)
    return np.stack([draws(statistic, groups, resamples, seed, width) for statistic in curves], axis=1)


def onset(curves: Float[np.ndarray, "... layer"]) -> Float[np.ndarray, "..."]:
    """Index of the first layer whose AUROC is at least 90 % of the way from 0.5 to the curve's peak.

    NaN for a curve that is nowhere above 0.5.

    Example:
        >>> float(onset(np.array([0.5, 0.6, 0.87, 0.9, 0.8])))
        2.0
    """
    peak = curves.max(axis=-1, keepdims=True)
    first = np.argmax(curves >= 0.5 + ONSET * (peak - 0.5), axis=-1).astype(np.float64)
    return np.where(peak[..., 0] > 0.5, first, math.nan)


def reliability(
    probabilities: Float[np.ndarray, " example"], labels: Bool[np.ndarray, " example"], bins: int
) -> list[dict[str, float]]:
    """Predicted against observed frequency in `bins` equal ranges of probability; empty ranges are left out."""
    place = np.clip((probabilities * bins).astype(int), 0, bins - 1)
    table = []
    for number in range(bins):
        rows = place == number
        if rows.any():
            predicted, observed = float(probabilities[rows].mean()), float(labels[rows].mean())
            edges = {"low": number / bins, "high": (number + 1) / bins}
            table.append({**edges, "predicted": predicted, "observed": observed, "n": int(rows.sum())})
    return table
