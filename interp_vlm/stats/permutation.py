"""Tests by flipping the sign of whole groups: exact under the hypothesis that the two conditions are exchangeable."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from interp_vlm.stats.bootstrap import difference
from interp_vlm.stats.estimate import Estimate
from interp_vlm.stats.inputs import Groups, as_column, as_groups, check_level, check_resamples

__all__ = ["max_statistic", "paired_test"]

PERMUTATIONS = 9999
ROWS = 1000  # sign patterns held at once


def paired_test(
    a: ArrayLike,
    b: ArrayLike,
    groups: Groups = None,
    *,
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Estimate:
    """Two-sided test that `a` and `b`, measured on the same observations, have the same mean.

    Under that hypothesis the two conditions may be exchanged within any group, all its observations together; `p` is
    the share of such exchanges with a mean difference at least as large. All 2**groups are tried when they are no more
    than `permutations`; else `permutations` of them at random, with the data counted among them (Phipson and Smyth
    2010). The value and its interval are those of `difference`.

    Args:
        a: (n,) numbers or booleans.
        b: (n,) numbers or booleans, in the order of `a`.
        groups: (n,) labels.

    Example:
        >>> paired_test([1, 1, 1, 1], [0, 0, 0, 0]).p
        0.125
    """
    check_resamples(permutations)
    estimate = difference(a, b, groups, level=level, seed=seed)
    change = as_column(a, "a") - as_column(b, "b")
    codes, count = as_groups(groups, len(change))
    sums = np.bincount(codes, weights=change, minlength=count)
    if not len(change):
        return replace(estimate, p=math.nan)
    observed = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # equal sums differ by rounding
    patterns = _sign_patterns(count, permutations, seed)
    extreme = sum(int(np.sum(np.abs(signs @ sums) >= observed)) for signs in patterns)
    exact = _is_exact(count, permutations)
    p = extreme / 2**count if exact else (extreme + 1) / (permutations + 1)
    method = f"sign flips of groups ({_how(exact, permutations)}), interval: {estimate.method}"
    return replace(estimate, p=p, method=method)


def max_statistic(
    values: ArrayLike,
    groups: Groups = None,
    *,
    level: float = 0.95,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> tuple[Estimate, ...]:
    """Test each column's mean against 0, holding the chance of any false claim over all columns (layers, heads).

    The largest absolute t over the columns, under sign flips of whole groups common to all columns, is the reference
    for every column (Westfall and Young 1993, single step), so that correlated columns cost little. Intervals are
    simultaneous: mean plus and minus the `level` quantile of that largest t, times the column's standard error.

    Args:
        values: (n, columns) paired differences, one row for each observation.
        groups: (n,) labels.

    Returns:
        One estimate a column, in order, with the adjusted `p`.

    Example:
        >>> layers = np.array([[1.0, 0.1], [1.2, -0.1], [0.9, 0.2], [1.1, -0.2], [1.0, 0.0]])
        >>> [round(estimate.p, 3) for estimate in max_statistic(layers)]
        [0.062, 1.0]
    """
    check_level(level)
    check_resamples(permutations)
    table = as_column(values, "values", ndim=2)
    codes, count = as_groups(groups, len(table))
    n = len(table)
    if n == 0 or count == 1:
        reason = "one group: no standard error" if n else "no observations"
        nothing = Estimate(math.nan, math.nan, math.nan, n, count, level, "max t", seed, math.nan, reason)
        return tuple(replace(nothing, value=float(column.mean()) if n else math.nan) for column in table.T)
    sums = np.stack([np.bincount(codes, weights=column, minlength=count) for column in table.T], axis=1)
    sizes = np.bincount(codes, minlength=count).astype(np.float64)
    means, errors, observed = (row[0] for row in _t(np.ones((1, count)), sums, sizes))
    patterns = _sign_patterns(count, permutations, seed)
    largest = np.concatenate([np.abs(_t(signs, sums, sizes)[2]).max(axis=1) for signs in patterns])
    exact = _is_exact(count, permutations)
    if not exact:
        largest = np.append(largest, np.abs(observed).max())
    p = np.mean(largest[:, None] >= np.abs(observed) * (1.0 - 1e-9), axis=0)
    reach = np.quantile(largest, level) * errors
    method = f"max t over {table.shape[1]} columns, sign flips of groups ({_how(exact, permutations)})"
    estimates = []
    for column, (value, error, half, adjusted) in enumerate(zip(means, errors, reach, p, strict=True)):
        flat = np.ptp(table[:, column]) == 0.0
        low, high = (math.nan, math.nan) if flat or error == 0.0 else (value - half, value + half)
        reason = f"no variance: every value is {value:g}" if flat else ""
        estimates.append(
            Estimate(float(value), float(low), float(high), n, count, level, method, seed, float(adjusted), reason)
        )
    return tuple(estimates)


def _t(
    signs: Float[np.ndarray, "pattern group"],
    sums: Float[np.ndarray, "group column"],
    sizes: Float[np.ndarray, "group"],
) -> tuple[Float[np.ndarray, "pattern column"], ...]:
    """Mean, its cluster-robust standard error, and their ratio, under each pattern of signs.

    The error is the root of groups / (groups - 1) * sum over groups of (signed sum - size * mean)**2 / n**2.
    """
    n, groups = sizes.sum(), len(sizes)
    means = signs @ sums / n
    squares = (sums**2).sum(axis=0) - 2.0 * means * (signs @ (sizes[:, None] * sums)) + means**2 * (sizes**2).sum()
    # identical groups leave rounding noise where the error is 0; a floor keeps their t finite, and huge
    squares = np.maximum(squares, 1e-12 * (sums**2).sum(axis=0))
    errors = np.sqrt(squares * groups / (groups - 1)) / n
    return means, errors, np.divide(means, errors, out=np.zeros_like(means), where=errors > 0.0)


def _how(exact: bool, permutations: int) -> str:
    return "exact" if exact else f"{permutations} drawn"


def _is_exact(groups: int, permutations: int) -> bool:
    return groups < 60 and 2**groups <= permutations


def _sign_patterns(groups: int, permutations: int, seed: int):
    """Blocks of (pattern, group) signs: every pattern once when they are few enough, else random ones."""
    if _is_exact(groups, permutations):
        bits = np.arange(2**groups)[:, None] >> np.arange(groups) & 1
        yield 1.0 - 2.0 * bits
        return
    rng = np.random.default_rng(seed)
    for start in range(0, permutations, ROWS):
        rows = min(ROWS, permutations - start)
        yield 1.0 - 2.0 * rng.integers(0, 2, (rows, groups))
