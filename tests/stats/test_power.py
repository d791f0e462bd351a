"""Smallest detectable effects against statsmodels, closed forms and simulation."""

import math

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from statsmodels.stats.power import TTestPower

from interp_vlm import stats
from interp_vlm.errors import DataError
from interp_vlm.stats import smallest_effect, smallest_margin


@pytest.mark.parametrize(("n", "alpha", "power"), [(4, 0.05, 0.8), (12, 0.05, 0.8), (60, 0.01, 0.9), (400, 0.10, 0.5)])
def test_smallest_effect_equals_statsmodels(n, alpha, power):
    values = np.random.default_rng(n).normal(0.3, 2.0, size=n)
    size = TTestPower().solve_power(nobs=n, alpha=alpha, power=power)
    found = smallest_effect(values, alpha=alpha, power=power)
    assert found.value == pytest.approx(size * values.std(ddof=1), rel=1e-4)  # its root finder is that coarse
    assert (found.n, found.groups, found.level) == (n, n, 1 - alpha)


def test_smallest_effect_counts_groups_and_not_questions():
    """Six equal questions about a picture are worth one."""
    pictures = np.random.default_rng(0).normal(size=20)
    assert smallest_effect(np.repeat(pictures, 6), np.repeat(np.arange(20), 6)).value == pytest.approx(
        smallest_effect(pictures).value
    )


def test_an_effect_of_that_size_is_found_with_that_power():
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(4000, 25))
    size = TTestPower().solve_power(nobs=25, alpha=0.05, power=0.8)
    assert np.mean(ttest_1samp(draws + size, 0.0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.02)
    found = [smallest_effect(row).value for row in draws[:200]]
    assert np.median(found) == pytest.approx(size, rel=0.03)


def test_smallest_margin_by_hand_and_by_simulation():
    values = np.array([0.3, -0.1, 0.2, -0.4, 0.05, 0.0, 0.1, -0.2])
    error = values.std(ddof=1) / math.sqrt(8)
    assert smallest_margin(values).value == pytest.approx((student.ppf(0.95, 7) + student.ppf(0.9, 7)) * error)
    rng = np.random.default_rng(2)
    draws = rng.normal(size=(2000, 40))
    margin = (student.ppf(0.95, 39) + student.ppf(0.9, 39)) / math.sqrt(40)
    shown = np.mean([stats.equivalence(row, margin).p < 0.05 for row in draws])
    assert shown == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("function", [smallest_effect, smallest_margin], ids=["effect", "margin"])
@pytest.mark.parametrize(
    ("values", "groups", "reason"),
    [([], None, "no observations"), ([1.0, 2.0], ["a", "a"], "one group"), ([0.3] * 7, None, "no variance")],
)
def test_without_scatter_there_is_a_reason(function, values, groups, reason):
    found = function(values, groups)
    assert math.isnan(found.value)
    assert reason in found.reason


def test_impossible_powers_are_refused():
    for function in (smallest_effect, smallest_margin):
        for power in (0.0, 1.0, math.nan):
            with pytest.raises(DataError):
                function([1.0, 2.0], power=power)
