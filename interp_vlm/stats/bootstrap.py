"""Estimates with intervals from a bootstrap over groups (pictures), for data in which several questions share one.

How the intervals are made, and how well they cover, is said in `interp_vlm.stats.resampling`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

from interp_vlm.stats.estimate import Estimate
from interp_vlm.stats.inputs import Groups, as_classes, as_column, as_groups
from interp_vlm.stats.resampling import RESAMPLES, Statistic, divide, estimate, without_interval

__all__ = [
    "auroc",
    "auroc_difference",
    "auroc_statistic",
    "difference",
    "mean",
    "point_biserial",
    "ratio_of_means",
]


def mean(
    values: ArrayLike,
    groups: Groups = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of values (accuracy, when they are true and false).

    When every value is 1, or every value is 0, nothing varies and no bootstrap can work: the interval is then the exact
    binomial one (Clopper-Pearson) with the groups as trials, which is conservative.

    Args:
        values: (n,) numbers or booleans.
        groups: (n,) labels; observations with one label are resampled together.

    Example:
        >>> mean([True, True, False, True], groups=["a", "a", "b", "c"]).value
        0.75
    """
    column = as_column(values, "values")
    found = _ratio(column, np.ones_like(column), groups, level, resamples, seed)
    if found.groups > 1 and column.min() == column.max() and column[0] in (0.0, 1.0):
        return _all_alike(bool(column[0]), found)
    return found


def difference(
    a: ArrayLike,
    b: ArrayLike,
    groups: Groups = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `a - b`, the two measured on the same observations (paired).

    Args:
        a: (n,) numbers or booleans.
        b: (n,) numbers or booleans, in the order of `a`.
        groups: (n,) labels.

    Example:
        >>> difference([1, 1, 0], [0, 1, 0]).value.__round__(3)
        0.333
    """
    first = as_column(a, "a")
    change = first - as_column(b, "b", len(first))
    return _ratio(change, np.ones_like(change), groups, level, resamples, seed)


def ratio_of_means(
    numerator: ArrayLike,
    denominator: ArrayLike,
    groups: Groups = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `numerator` over mean of `denominator`: the normalised effect of a patch.

    The ratio of means is stable where the mean of ratios is not. When the denominator's own interval includes 0, the
    set of ratios that the data allow is unbounded (Fieller 1954) and no interval is given.

    Args:
        numerator: (n,) for example the change of the answer's score that a patch causes.
        denominator: (n,) for example the change from corrupt to clean.
        groups: (n,) labels.

    Example:
        >>> ratio_of_means([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]).value
        0.5
    """
    top = as_column(numerator, "numerator")
    bottom = as_column(denominator, "denominator", len(top))
    found = _ratio(top, bottom, groups, level, resamples, seed)
    below = mean(bottom, groups, level=level, resamples=resamples, seed=seed)
    if below.low <= 0.0 <= below.high:
        return without_interval(found, "the interval of the denominator's mean includes 0")
    return found


def auroc(
    score: ArrayLike,
    label: ArrayLike,
    groups: Groups = None,
    *,
    strata: Groups = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Probability that a true observation scores above a false one, ties counting half (area under the ROC curve).

    Resamples without one of the classes are left out; if they are more than 1 in 20 no interval is given.

    Args:
        score: (n,) numbers, higher for true.
        label: (n,) booleans.
        groups: (n,) labels.
        strata: (n,) labels; only pairs of one stratum are compared, such as scores that come from one fit.

    Example:
        >>> auroc([0.1, 0.9, 0.8, 0.4], [False, True, True, True]).value
        1.0
    """
    scores = as_column(score, "score")
    labels = as_classes(label, "label", len(scores))
    codes, count = as_groups(groups, len(scores))
    statistic = auroc_statistic(scores, labels, _strata(strata, len(scores)), codes)
    found = estimate(statistic, len(scores), count, level, resamples, seed, width=len(scores))
    return _one_class(labels, found)


def auroc_difference(
    a: ArrayLike,
    b: ArrayLike,
    label: ArrayLike,
    groups: Groups = None,
    *,
    strata: Groups = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """AUROC of score `a` minus AUROC of score `b`, both of the same observations (paired: one draw of groups for both).

    Without groups this is the comparison of DeLong, DeLong and Clarke-Pearson (1988, Biometrics 44) by resampling.

    Args:
        a: (n,) numbers, higher for true.
        b: (n,) numbers, in the order of `a`.
        label: (n,) booleans.
        groups: (n,) labels.
        strata: (n,) labels; see `auroc`.

    Example:
        >>> auroc_difference([0.1, 0.2, 0.8, 0.9], [1, 1, 1, 1], [False, False, True, True]).value
        0.5
    """
    first = as_column(a, "a")
    second = as_column(b, "b", len(first))
    labels = as_classes(label, "label", len(first))
    codes, count = as_groups(groups, len(first))
    parts = _strata(strata, len(first))
    of_a, of_b = (auroc_statistic(scores, labels, parts, codes) for scores in (first, second))
    found = estimate(lambda d: of_a(d) - of_b(d), len(first), count, level, resamples, seed, width=2 * len(first))
    return _one_class(labels, found)


def auroc_statistic(
    scores: Float[np.ndarray, " example"],
    labels: Bool[np.ndarray, " example"],
    strata: Int[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"],
) -> Statistic:
    """The AUROC over pairs of one stratum, as a function of how often each group was drawn."""
    parts = []
    for stratum in np.unique(strata):
        inside = strata == stratum
        true, false = np.flatnonzero(inside & labels), np.flatnonzero(inside & ~labels)
        false = false[np.argsort(scores[false], kind="stable")]
        below = np.searchsorted(scores[false], scores[true], side="left")
        not_above = np.searchsorted(scores[false], scores[true], side="right")
        parts.append((codes[true], codes[false], below, not_above))

    def statistic(drawn: np.ndarray) -> np.ndarray:
        wins, pairs = np.zeros(len(drawn)), np.zeros(len(drawn))
        for true, false, below, not_above in parts:
            weights = drawn[:, true]
            cumulated = np.zeros((len(drawn), len(false) + 1))
            np.cumsum(drawn[:, false], axis=1, out=cumulated[:, 1:])
            wins += np.einsum("rt,rt->r", weights, cumulated[:, below] + cumulated[:, not_above]) / 2.0
            pairs += weights.sum(axis=1) * cumulated[:, -1]
        return divide(wins, pairs)

    return statistic


def point_biserial(
    score: ArrayLike,
    label: ArrayLike,
    groups: Groups = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Pearson correlation of a number with a class.

    Args:
        score: (n,) numbers.
        label: (n,) booleans.
        groups: (n,) labels.

    Example:
        >>> point_biserial([1.0, 2.0, 3.0, 4.0], [False, False, True, True]).value.__round__(3)
        0.894
    """
    scores = as_column(score, "score")
    labels = as_classes(label, "label", len(scores))
    codes, count = as_groups(groups, len(scores))
    centred = scores - (scores.mean() if len(scores) else 0.0)
    centred = centred / (np.abs(centred).max(initial=0.0) or 1.0)  # second moments neither overflow nor underflow
    y = labels.astype(np.float64)
    moments = np.stack(_totals(codes, count, np.ones_like(y), centred, y, centred * centred, centred * y), axis=1)

    def statistic(drawn: np.ndarray) -> np.ndarray:
        size, sx, sy, sxx, sxy = (drawn @ moments).T
        spread = np.maximum(size * sxx - sx * sx, 0.0) * np.maximum(size * sy - sy * sy, 0.0)
        return divide(size * sxy - sx * sy, np.sqrt(spread))

    found = _one_class(labels, estimate(statistic, len(scores), count, level, resamples, seed))
    if len(scores) and scores.min() == scores.max():
        return without_interval(found, f"no variance: every score is {scores[0]:g}", value=math.nan)
    return found


def _ratio(top: np.ndarray, bottom: np.ndarray, groups: Groups, level: float, resamples: int, seed: int) -> Estimate:
    """Sum of `top` over sum of `bottom`, and its interval."""
    codes, count = as_groups(groups, len(top))
    tops, bottoms = _totals(codes, count, top, bottom)
    return estimate(lambda drawn: divide(drawn @ tops, drawn @ bottoms), len(top), count, level, resamples, seed)


def _strata(strata: Groups, n: int) -> Int[np.ndarray, " n"]:
    """Number of each observation's stratum; without `strata` all are in one."""
    return np.zeros(n, dtype=np.intp) if strata is None else as_groups(strata, n, "strata")[0]


def _totals(codes: np.ndarray, groups: int, *columns: np.ndarray) -> tuple[Float[np.ndarray, "group"], ...]:
    return tuple(np.bincount(codes, weights=column, minlength=groups).astype(np.float64) for column in columns)


def _one_class(labels: np.ndarray, found: Estimate) -> Estimate:
    if len(labels) and labels.min() == labels.max():
        return without_interval(found, f"one class: every label is {bool(labels[0])}", value=math.nan)
    return found


def _all_alike(one: bool, found: Estimate) -> Estimate:
    """Exact binomial interval for a share of 0 or 1, each group counted as one trial."""
    limit = ((1.0 - found.level) / 2.0) ** (1.0 / found.groups)
    low, high = (limit, 1.0) if one else (0.0, 1.0 - limit)
    return replace(found, low=low, high=high, method="exact binomial, groups as trials", seed=None, reason="")
