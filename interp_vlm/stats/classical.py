"""Exact McNemar, equivalence by two one-sided tests, the smallest detectable effect, and Holm's correction."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from interp_vlm.errors import DataError
from interp_vlm.stats.estimate import Estimate
from interp_vlm.stats.inputs import Groups, as_classes, as_column, as_groups, check_level

__all__ = ["equivalence", "holm", "mcnemar", "smallest_effect", "smallest_margin"]


def mcnemar(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Exact McNemar test that two conditions are right equally often on the same observations.

    Only the pairs in which one is right and the other wrong carry information; their split is tested against one half
    (binomial, two-sided). The value is the difference of the two accuracies, `a` minus `b`; its interval is the
    Clopper-Pearson one of the split, in the same unit, so that it excludes 0 exactly when `p` < 1 - `level`. Pairs
    count as independent: where questions share pictures, `paired_test` is the test to report.

    Args:
        a: (n,) booleans, right or wrong.
        b: (n,) booleans, in the order of `a`.

    Example:
        >>> before, after = [True] * 4 + [False] * 196, [False] * 200
        >>> mcnemar(before, after).p
        0.125
    """
    check_level(level)
    first = as_classes(a, "a")
    second = as_classes(b, "b", len(first))
    n, only_a, only_b = len(first), int(np.sum(first & ~second)), int(np.sum(second & ~first))
    split = only_a + only_b
    method = f"exact McNemar, {only_a} against {only_b} discordant pairs"
    if split == 0:
        value, p = (0.0, 1.0) if n else (math.nan, math.nan)
        reason = "no discordant pairs" if n else "no observations"
        return Estimate(value, math.nan, math.nan, n, n, level, method, p=p, reason=reason)
    from scipy.stats import binomtest

    test = binomtest(only_a, split)
    interval = test.proportion_ci(level, method="exact")
    low, high = ((2.0 * share - 1.0) * split / n for share in (interval.low, interval.high))
    return Estimate((only_a - only_b) / n, low, high, n, n, level, method, p=float(test.pvalue))


def equivalence(
    values: ArrayLike,
    margin: float,
    groups: Groups = None,
    *,
    alpha: float = 0.05,
) -> Estimate:
    """Two one-sided tests (TOST, Schuirmann 1987) that the mean lies within `margin` of 0.

    "No effect was found" is not "there is no effect": call something robust only when `p` is below `alpha`, which is
    when the interval (of coverage 1 - 2 alpha) lies within the margin. The standard error is cluster-robust and t has
    groups - 1 degrees of freedom.

    Args:
        values: (n,) paired differences.
        margin: the largest mean, either way, that would not matter; in the unit of the values.
        groups: (n,) labels.
        alpha: level of each one-sided test.

    Example:
        >>> equivalence([0.01, -0.01, 0.0, 0.02, -0.02, 0.0], margin=0.05).p < 0.05
        True
    """
    check_level(alpha)
    if not 0.0 < margin < math.inf:
        raise DataError(f"margin is {margin!r}", expected="a positive number in the unit of the values")
    column = as_column(values, "values")
    codes, count = as_groups(groups, len(column))
    n, level, method = len(column), 1.0 - 2.0 * alpha, f"equivalence within ±{margin:g} (TOST, clustered t)"
    value = float(column.mean()) if n else math.nan
    error = _clustered_error(column, codes, count) if count > 1 else math.nan
    if not error > 0.0:
        return Estimate(value, math.nan, math.nan, n, count, level, method, p=math.nan, reason=_no_error(n, count))
    from scipy.special import stdtr, stdtrit

    p = max(stdtr(count - 1, (value - margin) / error), stdtr(count - 1, -(value + margin) / error))
    half = -stdtrit(count - 1, alpha) * error
    return Estimate(value, value - half, value + half, n, count, level, method, p=float(p))


def smallest_effect(values: ArrayLike, groups: Groups = None, *, alpha: float = 0.05, power: float = 0.80) -> Estimate:
    """The smallest mean of paired differences that a two-sided t test on these data would find with the wanted power.

    What stands beside a result without evidence: an effect smaller than this would most likely have been missed. The
    scatter is that of the data, its standard error cluster-robust; power is that of the noncentral t with groups - 1
    degrees of freedom.

    Args:
        values: (n,) paired differences.
        groups: (n,) labels.
        alpha: level of the two-sided test.
        power: chance to find the effect.

    Example:
        >>> smallest_effect([0.1, -0.1] * 50).value.__round__(3)
        0.028
    """
    check_level(alpha)
    check_level(power)
    method = f"smallest mean found by a two-sided t test at {alpha:g} with power {power:g} (clustered)"
    found, error = _scattered(values, groups, 1.0 - alpha, method)
    if not error > 0.0:
        return found
    from scipy.optimize import root_scalar
    from scipy.special import stdtrit
    from scipy.stats import nct

    freedom = found.groups - 1
    critical = -stdtrit(freedom, alpha / 2.0)

    def lacking(size: float) -> float:
        # where the other tail is too small for SciPy it is NaN
        return float(nct.sf(critical, freedom, size) + np.nan_to_num(nct.cdf(-critical, freedom, size))) - power

    high = critical + 1.0
    while lacking(high) < 0.0:
        high *= 2.0
    return replace(found, value=float(root_scalar(lacking, bracket=(0.0, high)).root) * error)


def smallest_margin(values: ArrayLike, groups: Groups = None, *, alpha: float = 0.05, power: float = 0.80) -> Estimate:
    """The smallest margin within which `equivalence` would hold with the wanted power, were the true mean 0.

    The margin is (t(1 - alpha) + t((1 + power) / 2)) standard errors, the usual approximation of the power of two
    one-sided tests (Chow, Shao and Wang 2008, section 3.1).

    Args:
        values: (n,) paired differences.
        groups: (n,) labels.
        alpha: level of each one-sided test.
        power: chance that both tests hold.

    Example:
        >>> smallest_margin([0.1, -0.1] * 50).value.__round__(3)
        0.03
    """
    check_level(alpha)
    check_level(power)
    method = f"smallest margin shown by two one-sided t tests at {alpha:g} with power {power:g} (clustered)"
    found, error = _scattered(values, groups, 1.0 - 2.0 * alpha, method)
    if not error > 0.0:
        return found
    from scipy.special import stdtrit

    freedom = found.groups - 1
    return replace(found, value=float(stdtrit(freedom, 1.0 - alpha) + stdtrit(freedom, (1.0 + power) / 2.0)) * error)


def _scattered(values: ArrayLike, groups: Groups, level: float, method: str) -> tuple[Estimate, float]:
    """An estimate without a value yet, and the standard error that it will rest on; a reason where there is none."""
    column = as_column(values, "values")
    codes, count = as_groups(groups, len(column))
    error = _clustered_error(column, codes, count) if count > 1 else 0.0
    reason = "" if error > 0.0 else _no_error(len(column), count)
    return Estimate(math.nan, math.nan, math.nan, len(column), count, level, method, reason=reason), error


def _no_error(n: int, groups: int) -> str:
    """Why there is no standard error."""
    return "no observations" if n == 0 else "one group: no standard error" if groups == 1 else "no variance"


def holm(pvalues: ArrayLike) -> Float[np.ndarray, "test"]:
    """P-values adjusted for their number (Holm 1979); those of undefined tests (NaN) stay NaN but are counted.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    from statsmodels.stats.multitest import multipletests

    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or np.any((p < 0.0) | (p > 1.0)):
        raise DataError(f"pvalues are {p.tolist()!r}", expected="a list of numbers from 0 to 1")
    if not len(p):
        return p
    undefined = np.isnan(p)
    adjusted = np.asarray(multipletests(np.where(undefined, 1.0, p), method="holm")[1])
    return np.where(undefined, math.nan, adjusted)


def _clustered_error(column: np.ndarray, codes: np.ndarray, groups: int) -> float:
    """Standard error of the mean when groups, not observations, are independent (one-sample CR1)."""
    residuals = np.bincount(codes, weights=column - column.mean(), minlength=groups)
    error = math.sqrt(groups / (groups - 1) * float(residuals @ residuals)) / len(column)
    return error if error > 1e-12 * float(np.abs(column).max()) else 0.0
