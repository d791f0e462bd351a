"""Sign-flip tests against SciPy, full enumeration by hand, and the error rates that they promise."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from interp_vlm import stats
from interp_vlm.errors import DataError


def pairs(seed: int, groups: int, size: int = 3, effect: float = 0.0):
    """Two conditions on the same questions; the questions of a picture react alike."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(groups), size)
    change = effect + rng.normal(size=groups)[codes] + 0.3 * rng.normal(size=groups * size)
    base = rng.normal(size=groups * size)
    return base + change, base, codes


def test_exact_p_equals_scipys_paired_permutation_test():
    a, b, codes = pairs(0, groups=9, effect=0.4)
    sums_a, sums_b = (np.bincount(codes, weights=x) for x in (a, b))
    reference = scipy_stats.permutation_test(
        (sums_a, sums_b), lambda x, y: np.sum(x - y), permutation_type="samples", n_resamples=np.inf
    )
    estimate = stats.paired_test(a, b, codes)
    assert estimate.p == pytest.approx(reference.pvalue)
    assert estimate.value == pytest.approx(np.mean(a - b))
    assert "exact" in estimate.method


def test_exact_p_equals_enumeration_of_unequal_groups():
    change, codes = np.array([2.0, 1.0, -0.5, 3.0, 1.0, 1.0]), np.array([0, 0, 1, 2, 2, 3])
    sums = [change[codes == group].sum() for group in range(4)]
    flips = [
        abs(sum(s * x for s, x in zip(signs, sums, strict=True))) for signs in itertools.product((1, -1), repeat=4)
    ]
    expected = np.mean([flip >= abs(sum(sums)) - 1e-12 for flip in flips])
    assert stats.paired_test(change, np.zeros(6), codes).p == pytest.approx(expected)


def test_drawn_p_is_near_scipys():
    a, b, codes = pairs(1, groups=40, effect=0.25)
    sums = np.bincount(codes, weights=a - b)
    reference = scipy_stats.permutation_test(
        (sums,),
        lambda x, axis: np.sum(x, axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        rng=np.random.default_rng(3),
    )
    assert stats.paired_test(a, b, codes).p == pytest.approx(reference.pvalue, abs=0.01)
    assert stats.paired_test(a, b, codes, seed=1) == stats.paired_test(a, b, codes, seed=1)


def test_error_rate_holds_with_groups_and_breaks_without():
    with_groups = without = 0
    for seed in range(300):
        a, b, codes = pairs(seed, groups=30)
        with_groups += stats.paired_test(a, b, codes, permutations=1000).p < 0.05
        without += stats.paired_test(a, b, permutations=1000).p < 0.05
    assert with_groups / 300 < 0.08
    assert without / 300 > 0.15  # the control: questions of one picture are not independent


def test_no_change_at_all_is_p_one():
    estimate = stats.paired_test([1, 0, 1], [1, 0, 1])
    assert estimate.p == 1.0
    assert "no variance" in estimate.reason


def test_nothing_to_test():
    assert math.isnan(stats.paired_test([], []).p)
    assert stats.paired_test([1.0, 2.0], [0.0, 0.0], ["a", "a"]).p == 1.0  # one group: both flips are as extreme
    assert math.isnan(stats.max_statistic(np.zeros((0, 2)))[1].p)
    lonely = stats.max_statistic([[1.0, 2.0]], ["a"])[1]
    assert (lonely.value, lonely.reason) == (2.0, "one group: no standard error")
    with pytest.raises(DataError, match="b has 3 values"):
        stats.paired_test([1, 2], [1, 2, 3])
    with pytest.raises(DataError, match="values has shape"):
        stats.max_statistic([1.0, 2.0])


def slow_error(change: np.ndarray, codes: np.ndarray) -> float:
    n, groups = len(change), len(set(codes))
    residual = change - change.mean()
    meat = sum(residual[codes == group].sum() ** 2 for group in set(codes))
    return math.sqrt(groups / (groups - 1) * meat / n**2)


def slow_t(change: np.ndarray, codes: np.ndarray) -> float:
    return change.mean() / slow_error(change, codes)


def test_max_statistic_equals_enumeration():
    rng = np.random.default_rng(0)
    codes = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5])
    table = rng.normal(size=(10, 4)) + np.array([1.0, 0.0, 0.5, 0.0])
    observed = [abs(slow_t(column, codes)) for column in table.T]
    largest = []
    for signs in itertools.product((1, -1), repeat=6):
        flipped = table * np.array(signs)[codes][:, None]
        largest.append(max(abs(slow_t(column, codes)) for column in flipped.T))
    expected = [np.mean(np.array(largest) >= t - 1e-9) for t in observed]
    estimates = stats.max_statistic(table, codes)
    assert [estimate.p for estimate in estimates] == pytest.approx(expected)
    assert [estimate.value for estimate in estimates] == pytest.approx(table.mean(axis=0).tolist())
    reach = [np.quantile(largest, 0.95) * slow_error(column, codes) for column in table.T]
    assert [estimate.high - estimate.value for estimate in estimates] == pytest.approx(reach)
    assert [estimate.value - estimate.low for estimate in estimates] == pytest.approx(reach)


def test_max_statistic_holds_the_family_and_bands_agree_with_p():
    false_claims = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        codes = np.repeat(np.arange(30), 3)
        table = rng.normal(size=(30, 8))[codes] + rng.normal(size=(90, 8))
        estimates = stats.max_statistic(table, codes, permutations=1000, seed=seed)
        false_claims += min(estimate.p for estimate in estimates) < 0.05
        for estimate in estimates:
            if abs(estimate.p - 0.05) > 0.002:
                assert (estimate.low > 0 or estimate.high < 0) == (estimate.p < 0.05)
    assert 0.02 <= false_claims / 200 <= 0.09


def test_max_statistic_finds_the_planted_column_among_flat_ones():
    rng = np.random.default_rng(0)
    table = np.column_stack([rng.normal(size=40), rng.normal(size=40) + 1.5, np.zeros(40), np.full(40, 0.2)])
    noise, planted, zero, constant = stats.max_statistic(table)
    assert planted.p < 0.01 < noise.p
    assert planted.low > 0
    assert (zero.p, zero.reason) == (1.0, "no variance: every value is 0")
    assert constant.p < 0.01
    assert math.isnan(constant.low)
