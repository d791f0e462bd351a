"""Estimates with intervals from a bootstrap over groups (pictures), for data in which several questions share one.

Whole groups are drawn with replacement. A statistic is a function of how often each group was drawn, (resample, group)
to (resample,), so that a resample never copies data: 2,000 resamples are a few matrix products.

The interval is BCa (bias-corrected and accelerated; Efron 1987, JASA 82, equations 2.3 and 6.6) with tails widened for
few groups as Hesterberg (2015, The American Statistician 69, section 5.3) does for the percentile interval: the normal
quantile is replaced by a t quantile with groups - 1 degrees of freedom times sqrt(groups / (groups - 1)). Coverage of a
nominal 95 % interval, 1,500 simulated data sets of 6 questions a picture, 1,000 resamples:

    groups                           20                    50                    100
                       percentile  ours      percentile  ours      percentile  ours
    accuracy 0.9            0.903  0.943          0.944  0.955          0.948  0.957
    accuracy 0.6            0.940  0.961          0.941  0.947          0.942  0.948
    log-normal mean         0.888  0.913          0.917  0.928          0.947  0.946
    AUROC, half positive    0.919  0.947          0.938  0.944          0.952  0.958
    AUROC, 9 in 10          0.911  0.950          0.936  0.955          0.940  0.954
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from interp_vlm.stats.estimate import Estimate
from interp_vlm.stats.inputs import Groups, as_classes, as_column, as_groups, check_level, check_resamples

__all__ = ["auroc", "difference", "mean", "point_biserial", "ratio_of_means"]

METHOD = "bootstrap over groups (BCa)"
RESAMPLES = 2000
MOST_UNDEFINED = 0.05  # more undefined resamples than this would bend the interval: none is given

Counts = Float[np.ndarray, "resample group"]
Statistic = Callable[[np.ndarray], np.ndarray]


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
    estimate = _ratio(column, np.ones_like(column), groups, level, resamples, seed)
    if estimate.groups > 1 and column.min() == column.max() and column[0] in (0.0, 1.0):
        return _all_alike(bool(column[0]), estimate)
    return estimate


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
    estimate = _ratio(top, bottom, groups, level, resamples, seed)
    below = mean(bottom, groups, level=level, resamples=resamples, seed=seed)
    if below.low <= 0.0 <= below.high:
        return _without_interval(estimate, "the interval of the denominator's mean includes 0")
    return estimate


def auroc(
    score: ArrayLike,
    label: ArrayLike,
    groups: Groups = None,
    *,
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

    Example:
        >>> auroc([0.1, 0.9, 0.8, 0.4], [False, True, True, True]).value
        1.0
    """
    scores = as_column(score, "score")
    labels = as_classes(label, "label", len(scores))
    codes, count = as_groups(groups, len(scores))
    true, false = np.flatnonzero(labels), np.flatnonzero(~labels)
    false = false[np.argsort(scores[false], kind="stable")]
    below = np.searchsorted(scores[false], scores[true], side="left")
    not_above = np.searchsorted(scores[false], scores[true], side="right")

    def statistic(drawn: np.ndarray) -> np.ndarray:
        weights = drawn[:, codes[true]]
        cumulated = np.zeros((len(drawn), len(false) + 1))
        np.cumsum(drawn[:, codes[false]], axis=1, out=cumulated[:, 1:])
        wins = np.einsum("rt,rt->r", weights, cumulated[:, below] + cumulated[:, not_above]) / 2.0
        return _divide(wins, weights.sum(axis=1) * cumulated[:, -1])

    return _one_class(labels, _bootstrap(statistic, len(scores), count, level, resamples, seed, width=len(scores)))


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
        return _divide(size * sxy - sx * sy, np.sqrt(spread))

    estimate = _one_class(labels, _bootstrap(statistic, len(scores), count, level, resamples, seed))
    if len(scores) and scores.min() == scores.max():
        return _without_interval(estimate, f"no variance: every score is {scores[0]:g}", value=math.nan)
    return estimate


def _ratio(top: np.ndarray, bottom: np.ndarray, groups: Groups, level: float, resamples: int, seed: int) -> Estimate:
    """Sum of `top` over sum of `bottom`, and its interval."""
    codes, count = as_groups(groups, len(top))
    tops, bottoms = _totals(codes, count, top, bottom)
    return _bootstrap(lambda drawn: _divide(drawn @ tops, drawn @ bottoms), len(top), count, level, resamples, seed)


def _bootstrap(
    statistic: Statistic, n: int, groups: int, level: float, resamples: int, seed: int, width: int = 1
) -> Estimate:
    """The statistic on the data, and its interval; `width`: how many floats the statistic holds for one resample."""
    check_level(level)
    check_resamples(resamples)
    value = float(statistic(np.ones((1, groups)))[0]) if n else math.nan
    estimate = Estimate(value, math.nan, math.nan, n, groups, level, METHOD, seed)
    if n == 0:
        return _without_interval(estimate, "no observations")
    if groups == 1:
        return _without_interval(estimate, "one group: nothing to resample")
    rows = max(1, 1_000_000 // max(groups, width))
    rng = np.random.default_rng(seed)
    draws = np.concatenate([statistic(_draw(rng, size, groups)) for size in _chunks(resamples, rows)])
    known = draws[np.isfinite(draws)]
    if not math.isfinite(value):
        return _without_interval(estimate, "undefined: a divisor is 0")
    if len(known) < (1.0 - MOST_UNDEFINED) * resamples:
        return _without_interval(estimate, f"undefined in {resamples - len(known)} of {resamples} resamples")
    if np.ptp(known) <= 1e-12 * abs(value):
        return _without_interval(estimate, f"no variance: every resample gives {value:g}")
    low, high = np.quantile(known, _bca_quantiles(known, value, _jackknife(statistic, groups, rows), groups, level))
    return Estimate(value, float(low), float(high), n, groups, level, METHOD, seed)


def _bca_quantiles(draws: np.ndarray, value: float, jackknife: np.ndarray, groups: int, level: float) -> np.ndarray:
    """Which quantiles of the draws bound the interval."""
    from scipy.special import ndtr, ndtri, stdtrit

    z = np.array([-1.0, 1.0]) * -stdtrit(groups - 1, (1.0 - level) / 2.0) * math.sqrt(groups / (groups - 1))
    share_below = (np.sum(draws < value) + np.sum(draws == value) / 2.0) / len(draws)
    bias = ndtri(np.clip(share_below, 1.0 / len(draws), 1.0 - 1.0 / len(draws)))
    skew = jackknife.mean() - jackknife
    scale = np.sum(skew**2)
    acceleration = np.sum(skew**3) / (6.0 * scale**1.5) if scale > 0.0 else 0.0
    return ndtr(bias + (bias + z) / np.maximum(1.0 - acceleration * (bias + z), 1e-3))


def _jackknife(statistic: Statistic, groups: int, rows: int) -> np.ndarray:
    """The statistic without each group in turn; beyond 1,000 groups, without each of 1,000 blocks of groups."""
    blocks = np.arange(groups) % min(groups, 1000)
    starts = range(0, int(blocks.max()) + 1, rows)
    left_out = [np.arange(start, min(start + rows, int(blocks.max()) + 1)) for start in starts]
    values = np.concatenate([statistic((blocks != block[:, None]).astype(np.float64)) for block in left_out])
    return values[np.isfinite(values)]


def _draw(rng: np.random.Generator, resamples: int, groups: int) -> Counts:
    """How often each group comes up when `groups` groups are drawn with replacement."""
    drawn = rng.integers(0, groups, (resamples, groups)) + groups * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * groups).reshape(resamples, groups).astype(np.float64)


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def _totals(codes: np.ndarray, groups: int, *columns: np.ndarray) -> tuple[Float[np.ndarray, "group"], ...]:
    return tuple(np.bincount(codes, weights=column, minlength=groups).astype(np.float64) for column in columns)


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """`top / bottom`, NaN where the bottom is 0."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0.0)


def _without_interval(estimate: Estimate, reason: str, value: float | None = None) -> Estimate:
    value = estimate.value if value is None else value
    return replace(estimate, value=value, low=math.nan, high=math.nan, reason=reason)


def _one_class(labels: np.ndarray, estimate: Estimate) -> Estimate:
    if len(labels) and labels.min() == labels.max():
        return _without_interval(estimate, f"one class: every label is {bool(labels[0])}", value=math.nan)
    return estimate


def _all_alike(one: bool, estimate: Estimate) -> Estimate:
    """Exact binomial interval for a share of 0 or 1, each group counted as one trial."""
    limit = ((1.0 - estimate.level) / 2.0) ** (1.0 / estimate.groups)
    low, high = (limit, 1.0) if one else (0.0, 1.0 - limit)
    return replace(estimate, low=low, high=high, method="exact binomial, groups as trials", seed=None, reason="")
