"""McNemar, equivalence and Holm against statsmodels, SciPy and numbers worked by hand."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.weightstats import DescrStatsW

from interp_vlm import stats
from interp_vlm.errors import DataError


@pytest.mark.parametrize("seed", range(5))
def test_mcnemar_equals_statsmodels(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random(80) < 0.8, rng.random(80) < 0.65
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    estimate = stats.mcnemar(a, b)
    assert estimate.p == pytest.approx(reference_mcnemar(table, exact=True).pvalue)
    assert estimate.value == pytest.approx(a.mean() - b.mean())
    assert (estimate.low > 0 or estimate.high < 0) == (estimate.p < 0.05)


def test_mcnemar_on_the_papers_five_neurons():
    """54.5 % to 52.5 % of 200: at least 4 pairs changed, and 4 against 0 is p = .125."""
    before = np.array([True] * 109 + [False] * 91)
    after = np.array([True] * 105 + [False] * 95)
    estimate = stats.mcnemar(before, after)
    assert (estimate.value, estimate.p) == (pytest.approx(0.02), 0.125)
    assert estimate.low < 0 < estimate.high


def test_mcnemar_without_discordant_pairs():
    estimate = stats.mcnemar([True, False], [True, False])
    assert (estimate.value, estimate.p, estimate.reason) == (0.0, 1.0, "no discordant pairs")
    assert math.isnan(stats.mcnemar([], []).p)
    with pytest.raises(DataError, match="a holds 2"):
        stats.mcnemar([1, 2], [0, 1])


@pytest.mark.parametrize("margin", [0.1, 0.3, 1.0])
def test_equivalence_equals_statsmodels_without_groups(margin):
    values = np.random.default_rng(0).normal(0.05, 0.5, size=50)
    p, _, _ = DescrStatsW(values).ttost_mean(-margin, margin)
    low, high = DescrStatsW(values).tconfint_mean(alpha=0.10)
    estimate = stats.equivalence(values, margin)
    assert (estimate.p, estimate.low, estimate.high) == pytest.approx((p, low, high))
    assert (estimate.p < 0.05) == (-margin < low and high < margin)


def test_equivalence_equals_statsmodels_cluster_robust_regression():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 15, size=90)
    values = 0.3 * rng.normal(size=15)[codes] + rng.normal(size=90) * 0.2
    fit = sm.OLS(values, np.ones(90)).fit(cov_type="cluster", cov_kwds={"groups": codes}, use_t=True)
    low, high = fit.conf_int(alpha=0.10)[0]
    estimate = stats.equivalence(values, 0.4, codes)
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    upper = fit.t_test(([[1.0]], 0.4)).pvalue / 2
    lower = fit.t_test(([[1.0]], -0.4)).pvalue / 2
    assert estimate.p == pytest.approx(max(float(upper), float(lower)))
    assert estimate.groups == 15


def test_equivalence_does_not_mistake_few_data_for_no_effect():
    rng = np.random.default_rng(2)
    assert stats.equivalence(rng.normal(size=8), 0.2).p > 0.05  # no effect, but nothing shown either
    assert stats.equivalence(rng.normal(size=800), 0.2).p < 0.05
    assert stats.equivalence(rng.normal(0.5, 1.0, size=800), 0.2).p > 0.95


@pytest.mark.parametrize(
    ("values", "groups", "reason"),
    [([], None, "no observations"), ([1.0, 2.0], ["a", "a"], "one group"), ([0.3] * 7, None, "no variance")],
)
def test_equivalence_degenerate(values, groups, reason):
    estimate = stats.equivalence(values, 0.5, groups)
    assert math.isnan(estimate.p)
    assert reason in estimate.reason


def test_equivalence_refuses_a_margin_that_is_none():
    for margin in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="margin is"):
            stats.equivalence([1.0, 2.0], margin)


def test_holm_by_hand():
    """Sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made monotone: .04 .06 .06 .06."""
    assert stats.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.6, 0.7]).tolist() == [1.0, 1.0]
    assert stats.holm([]).tolist() == []


def test_holm_counts_undefined_tests_and_refuses_what_is_no_p():
    adjusted = stats.holm([0.01, math.nan])
    assert adjusted[0] == pytest.approx(0.02)
    assert math.isnan(adjusted[1])
    with pytest.raises(DataError, match="pvalues"):
        stats.holm([0.2, 1.2])
