"""The bootstrap over groups (pictures) under every interval: whole groups are drawn with replacement.

A statistic is a function of how often each group was drawn, (resample, group) to (resample,), so that a resample never
copies data: 2,000 resamples are a few matrix products.

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
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from interp_vlm.stats.estimate import Estimate
from interp_vlm.stats.inputs import check_level, check_resamples

__all__ = ["METHOD", "RESAMPLES", "Counts", "Statistic", "divide", "draws", "estimate", "estimates", "without_interval"]

METHOD = "bootstrap over groups (BCa)"
RESAMPLES = 2000
MOST_UNDEFINED = 0.05  # more undefined resamples than this would bend the interval: none is given

Counts = Float[np.ndarray, "resample group"]
Statistic = Callable[[np.ndarray], np.ndarray]


def estimate(
    statistic: Statistic, n: int, groups: int, level: float, resamples: int, seed: int, width: int = 1
) -> Estimate:
    """A statistic on the data, and its interval.

    Args:
        statistic: from how often each group was drawn, (resample, group), to its value, (resample,).
        n: observations.
        groups: how many groups they form.
        level: coverage of the interval.
        resamples: draws of all groups.
        seed: of the draws.
        width: how many floats the statistic holds for one resample, so that memory stays bounded.

    Example:
        >>> right = np.array([3.0, 2.0, 1.0, 3.0, 0.0])  # of three questions about each of five pictures
        >>> estimate(lambda drawn: drawn @ right / (3 * drawn.sum(1)), 15, 5, 0.95, 2000, seed=0).value
        0.6
    """
    (found,) = estimates(lambda drawn: statistic(drawn)[:, None], n, groups, level, resamples, seed, width)
    return found


def estimates(
    statistic: Statistic, n: int, groups: int, level: float, resamples: int, seed: int, width: int = 1
) -> tuple[Estimate, ...]:
    """`estimate` of several statistics on the same resamples; `statistic` gives (resample, statistic)."""
    check_level(level)
    check_resamples(resamples)
    values = statistic(np.ones((1, groups)))[0]
    found = [Estimate(float(v) if n else math.nan, math.nan, math.nan, n, groups, level, METHOD, seed) for v in values]
    if n == 0 or groups == 1:
        reason = "no observations" if n == 0 else "one group: nothing to resample"
        return tuple(without_interval(each, reason) for each in found)
    drawn = draws(statistic, groups, resamples, seed, width)
    left_out = _jackknife(statistic, groups, _rows(groups, width))
    return tuple(map(_with_interval, found, drawn.T, left_out.T))


def draws(
    statistic: Statistic, groups: int, resamples: int, seed: int, width: int = 1
) -> Float[np.ndarray, "resample *statistic"]:
    """The statistic in each resample of the groups; the same seed draws the same groups."""
    rng = np.random.default_rng(seed)
    sizes = _chunks(resamples, _rows(groups, width))
    return np.concatenate([statistic(_counts(rng, size, groups)) for size in sizes])


def divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """`top / bottom`, NaN where the bottom is 0."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0.0)


def without_interval(found: Estimate, reason: str, value: float | None = None) -> Estimate:
    """The estimate with the reason why it has no interval, and with another value where one is given."""
    return replace(found, value=found.value if value is None else value, low=math.nan, high=math.nan, reason=reason)


def _with_interval(found: Estimate, drawn: np.ndarray, left_out: np.ndarray) -> Estimate:
    value, known = found.value, drawn[np.isfinite(drawn)]
    if not math.isfinite(value):
        return without_interval(found, "undefined: a divisor is 0")
    if len(known) < (1.0 - MOST_UNDEFINED) * len(drawn):
        return without_interval(found, f"undefined in {len(drawn) - len(known)} of {len(drawn)} resamples")
    if np.ptp(known) <= 1e-12 * abs(value):
        return without_interval(found, f"no variance: every resample gives {value:g}")
    jackknife = left_out[np.isfinite(left_out)]
    low, high = np.quantile(known, _bca_quantiles(known, value, jackknife, found.groups, found.level))
    return replace(found, low=float(low), high=float(high))


def _bca_quantiles(drawn: np.ndarray, value: float, jackknife: np.ndarray, groups: int, level: float) -> np.ndarray:
    """Which quantiles of the draws bound the interval."""
    from scipy.special import ndtr, ndtri, stdtrit

    z = np.array([-1.0, 1.0]) * -stdtrit(groups - 1, (1.0 - level) / 2.0) * math.sqrt(groups / (groups - 1))
    share_below = (np.sum(drawn < value) + np.sum(drawn == value) / 2.0) / len(drawn)
    bias = ndtri(np.clip(share_below, 1.0 / len(drawn), 1.0 - 1.0 / len(drawn)))
    skew = jackknife.mean() - jackknife
    scale = np.sum(skew**2)
    acceleration = np.sum(skew**3) / (6.0 * scale**1.5) if scale > 0.0 else 0.0
    return ndtr(bias + (bias + z) / np.maximum(1.0 - acceleration * (bias + z), 1e-3))


def _jackknife(statistic: Statistic, groups: int, rows: int) -> np.ndarray:
    """The statistic without each group in turn; beyond 1,000 groups, without each of 1,000 blocks of groups."""
    blocks = np.arange(groups) % min(groups, 1000)
    left_out = np.split(np.arange(blocks.max() + 1), range(rows, int(blocks.max()) + 1, rows))
    return np.concatenate([statistic((blocks != block[:, None]).astype(np.float64)) for block in left_out])


def _counts(rng: np.random.Generator, resamples: int, groups: int) -> Counts:
    """How often each group comes up when `groups` groups are drawn with replacement."""
    drawn = rng.integers(0, groups, (resamples, groups)) + groups * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * groups).reshape(resamples, groups).astype(np.float64)


def _rows(groups: int, width: int) -> int:
    """How many resamples to hold at once."""
    return max(1, 1_000_000 // max(groups, width))


def _chunks(total: int, size: int) -> Iterator[int]:
    return (min(size, total - start) for start in range(0, total, size))
