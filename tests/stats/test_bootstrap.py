"""Estimates against scikit-learn and SciPy; intervals against SciPy's BCa over slow copies, and by coverage."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from interp_vlm import stats
from interp_vlm.errors import DataError


def clustered(seed: int, groups: int = 40, size: int = 5):
    """Scores and labels of questions that share pictures: both have a picture effect."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(groups), size)
    effect = rng.normal(size=groups)[codes]
    label = rng.random(groups * size) < 1.0 / (1.0 + np.exp(-effect))
    score = 0.5 * effect + rng.normal(size=groups * size) + label
    return score, label, codes


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30))
def test_values_equal_the_libraries_also_with_ties(rows):
    score, label, groups = (np.array(column) for column in zip(*rows, strict=True))
    assert stats.mean(score, groups).value == pytest.approx(np.mean(score))
    if label.min() != label.max():
        assert stats.auroc(score, label, groups).value == pytest.approx(roc_auc_score(label, score))
        if score.min() != score.max():
            expected = scipy_stats.pointbiserialr(label, score).statistic
            assert stats.point_biserial(score, label, groups).value == pytest.approx(expected)


def test_difference_and_ratio_of_means_are_what_they_say():
    score, label, groups = clustered(0)
    assert stats.difference(score, label, groups).value == pytest.approx(np.mean(score - label))
    assert stats.ratio_of_means(score, label, groups).value == pytest.approx(np.sum(score) / np.sum(label))


def rank_auroc(score, label):
    """Mann-Whitney: the sum of the ranks of the true ones, less its minimum, over the number of pairs."""
    true = int(label.sum())
    return (scipy_stats.rankdata(score)[label].sum() - true * (true + 1) / 2) / (true * (len(label) - true))


ESTIMATORS = {
    "mean": (lambda s, y, g, **kw: stats.mean(s, g, **kw), lambda s, y: np.mean(s)),
    "difference": (lambda s, y, g, **kw: stats.difference(s, y, g, **kw), lambda s, y: np.mean(s) - np.mean(y)),
    "ratio": (lambda s, y, g, **kw: stats.ratio_of_means(s, y, g, **kw), lambda s, y: np.mean(s) / np.mean(y)),
    "auroc": (stats.auroc, rank_auroc),
    "point_biserial": (stats.point_biserial, lambda s, y: scipy_stats.pearsonr(s, y).statistic),
}


def widened(groups: int) -> float:
    """The level at which a plain interval has the tails that a 95 % one should have with so few groups."""
    return 1 - 2 * scipy_stats.norm.cdf(scipy_stats.t.ppf(0.025, groups - 1) * math.sqrt(groups / (groups - 1)))


def test_few_skewed_values_against_scipys_bca():
    """With ten values the bias, the acceleration and the widening each move an end by more than the tolerance."""
    values = np.random.default_rng(8).lognormal(sigma=1.2, size=10)
    reference = scipy_stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=200_000,
        confidence_level=widened(10),
        batch=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    estimate = stats.mean(values, resamples=200_000)
    width = reference.high - reference.low
    assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high), abs=0.02 * width)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_interval_equals_scipys_bca_over_whole_groups(name):
    """SciPy resamples the group numbers, and the statistic copies the rows of each drawn group: slow and obvious."""
    ours, slow = ESTIMATORS[name]
    score, label, codes = clustered(1)
    groups = codes.max() + 1
    rows = [np.flatnonzero(codes == group) for group in range(groups)]

    def statistic(drawn):
        chosen = np.concatenate([rows[int(group)] for group in drawn])
        return slow(score[chosen], label[chosen])

    reference = scipy_stats.bootstrap(
        (np.arange(groups),),
        statistic,
        vectorized=False,
        n_resamples=2000,
        confidence_level=widened(groups),
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    estimate = ours(score, label, codes, resamples=20_000)
    width = estimate.high - estimate.low
    assert estimate.low == pytest.approx(reference.low, abs=0.06 * width)
    assert estimate.high == pytest.approx(reference.high, abs=0.06 * width)


def test_nominal_coverage_on_clustered_data():
    """Accuracy .9 with within-picture correlation .2, and AUROC: 95 % intervals hold the truth in 93 to 97 %."""
    rng = np.random.default_rng(0)
    simulations, groups, size, accuracy, correlation = 600, 60, 6, 0.9, 0.2
    codes = np.repeat(np.arange(groups), size)
    spread = (1 - correlation) / correlation
    true_auroc = scipy_stats.norm.cdf(1.2 / math.sqrt(2 * (1 + 0.7**2)))
    held = {"mean": 0, "auroc": 0, "mean, pictures ignored": 0}
    for seed in range(simulations):
        right = rng.random(groups * size) < rng.beta(accuracy * spread, (1 - accuracy) * spread, groups)[codes]
        score = 0.7 * rng.normal(size=groups)[codes] + rng.normal(size=groups * size)
        label = rng.random(groups * size) < 0.8
        for name, truth, estimate in (
            ("mean", accuracy, stats.mean(right, codes, resamples=1000, seed=seed)),
            ("auroc", true_auroc, stats.auroc(score + 1.2 * label, label, codes, resamples=1000, seed=seed)),
        ):
            held[name] += estimate.low <= truth <= estimate.high
        naive = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / len(right))
        held["mean, pictures ignored"] += abs(right.mean() - accuracy) <= naive
    coverage = {name: count / simulations for name, count in held.items()}
    assert 0.93 <= coverage["mean"] <= 0.97, coverage
    assert 0.93 <= coverage["auroc"] <= 0.97, coverage
    assert coverage["mean, pictures ignored"] < 0.90, coverage  # the control: without groups the interval is too narrow


def test_auroc_within_strata_compares_pairs_of_one_stratum_alone():
    score, label, groups = clustered(6)
    strata = groups % 3
    shifted = score + 10.0 * strata  # between strata nothing may be compared
    parts = [(label[strata == part], score[strata == part]) for part in range(3)]
    expected = np.average([roc_auc_score(*part) for part in parts], weights=[y.sum() * (~y).sum() for y, _ in parts])
    found = stats.auroc(shifted, label, groups, strata=strata)
    assert found.value == pytest.approx(expected)
    assert found == stats.auroc(score, label, groups, strata=strata)
    assert stats.auroc(score, label, groups) == stats.auroc(score, label, groups, strata=["all"] * len(score))
    with pytest.raises(DataError, match="strata has 2 values"):
        stats.auroc(score, label, groups, strata=[1, 2])


def delong(a, b, label):
    """Difference of two AUROCs and its standard error in closed form (DeLong et al. 1988), by the pairs themselves."""
    scores = np.stack([a, b])
    true, false = scores[:, label], scores[:, ~label]
    wins = (true[:, :, None] > false[:, None, :]) + 0.5 * (true[:, :, None] == false[:, None, :])
    of_true, of_false = np.cov(wins.mean(axis=2)), np.cov(wins.mean(axis=1))
    cover = of_true / true.shape[1] + of_false / false.shape[1]
    value = wins.mean(axis=(1, 2))
    return value[0] - value[1], math.sqrt(cover[0, 0] + cover[1, 1] - 2 * cover[0, 1])


@pytest.mark.parametrize("ties", [False, True])
def test_difference_of_aurocs_is_delongs(ties):
    rng = np.random.default_rng(7)
    label = rng.random(600) < 0.7
    common = rng.normal(size=600)
    a, b = (common + rng.normal(size=600) + gain * label for gain in (1.5, 0.8))
    a, b = (np.round(a), np.round(b)) if ties else (a, b)
    value, error = delong(a, b, label)
    found = stats.auroc_difference(a, b, label, resamples=20_000)
    assert found.value == pytest.approx(value)
    assert found.value == pytest.approx(roc_auc_score(label, a) - roc_auc_score(label, b))
    assert (found.low, found.high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.1 * error)
    # paired: as two independent samples the interval would be wider by far
    alone = sum((stats.auroc(score, label).high - stats.auroc(score, label).low) ** 2 for score in (a, b))
    assert found.high - found.low < 0.9 * math.sqrt(alone)


def test_difference_of_aurocs_of_one_score_is_nothing_and_of_the_strata_is_theirs():
    score, label, groups = clustered(8)
    assert stats.auroc_difference(score, score, label, groups).value == 0.0
    assert "one class" in stats.auroc_difference(score, -score, np.ones(len(score)), groups).reason
    other = np.random.default_rng(0).normal(size=len(score))
    each = [stats.auroc(s, label, groups, strata=groups % 2).value for s in (score, other)]
    found = stats.auroc_difference(score, other, label, groups, strata=groups % 2)
    assert found.value == pytest.approx(each[0] - each[1])
    assert found.groups == 40


def test_coverage_of_the_difference_of_aurocs_on_clustered_data():
    """Two scores of the same questions that share pictures: 95 % intervals hold the truth in 93 to 97 %."""
    rng, held, simulations = np.random.default_rng(1), 0, 800
    codes = np.repeat(np.arange(40), 3)
    gains, spread = (1.4, 0.7), math.sqrt(1 + 0.6**2)
    truth = np.subtract(*(scipy_stats.norm.cdf(gain / (spread * math.sqrt(2))) for gain in gains))
    for seed in range(simulations):
        label = rng.random(120) < 0.7
        a, b = (0.6 * rng.normal(size=40)[codes] + rng.normal(size=120) + gain * label for gain in gains)
        found = stats.auroc_difference(a, b, label, codes, resamples=1000, seed=seed)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / simulations <= 0.97, held


def test_fast_enough_for_a_table_of_estimates():
    score, label, groups = clustered(2, groups=100, size=6)
    stats.auroc(score, label, groups)  # imports and caches
    start = time.perf_counter()
    for estimate in (stats.mean, stats.auroc, stats.point_biserial):
        arguments = (score, groups) if estimate is stats.mean else (score, label, groups)
        estimate(*arguments, resamples=2000)
    assert time.perf_counter() - start < 1.0


def test_repeatable_and_independent_of_the_order_of_rows():
    score, label, groups = clustered(3)
    names = np.array([f"picture {group:02d}" for group in groups])
    first = stats.auroc(score, label, names, seed=4)
    assert first == stats.auroc(score, label, names, seed=4)
    assert first.low != stats.auroc(score, label, names, seed=5).low
    order = np.random.default_rng(0).permutation(len(score))
    shuffled = stats.auroc(score[order], label[order], list(names[order]), seed=4)
    assert (shuffled.low, shuffled.high) == pytest.approx((first.low, first.high), abs=1e-12)


def test_without_groups_each_observation_is_its_own():
    score = clustered(4)[0]
    assert stats.mean(score) == stats.mean(score, np.arange(len(score)))
    assert stats.mean(score).groups == len(score)


def test_wider_level_gives_wider_interval_and_more_than_a_thousand_groups_work():
    values = np.random.default_rng(0).normal(size=2500)
    narrow, wide = stats.mean(values, level=0.8), stats.mean(values, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    error = scipy_stats.sem(values)
    assert (narrow.high - narrow.low) == pytest.approx(2 * 1.2816 * error, rel=0.06)


def test_accuracy_of_one_gets_the_exact_binomial_interval():
    estimate = stats.mean(np.ones(60, bool), np.repeat(np.arange(20), 3))
    exact = scipy_stats.binomtest(20, 20).proportion_ci(0.95, "exact")
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((1.0, exact.low, exact.high))
    none = stats.mean(np.zeros(60), np.repeat(np.arange(20), 3))
    assert (none.value, none.low, none.high) == pytest.approx((0.0, 1 - exact.high, 1 - exact.low))
    assert "exact binomial" in none.method


DEGENERATE = {
    "one class": (lambda: stats.auroc([1.0, 2.0, 3.0], [True] * 3), math.nan, "one class: every label is True"),
    "one class, correlation": (lambda: stats.point_biserial([1.0, 2.0], [0, 0]), math.nan, "one class"),
    "constant score": (lambda: stats.point_biserial([2.0] * 4, [0, 1, 0, 1]), math.nan, "every score is 2"),
    "uninformative score": (lambda: stats.auroc([2.0] * 40, [0, 1] * 20), 0.5, "no variance"),
    "separated": (lambda: stats.auroc(np.arange(40), np.arange(40) > 19), 1.0, "no variance"),
    "constant": (lambda: stats.mean([0.3] * 9), 0.3, "no variance"),
    "no change": (lambda: stats.difference([1, 0, 1], [1, 0, 1]), 0.0, "no variance"),
    "one group": (lambda: stats.mean([1.0, 2.0], ["a", "a"]), 1.5, "one group"),
    "no rows": (lambda: stats.mean([]), math.nan, "no observations"),
    "no rows, auroc": (lambda: stats.auroc([], []), math.nan, "no observations"),
    "rare class": (lambda: stats.auroc(np.arange(60), np.arange(60) == 30), 30 / 59, "undefined in"),
    "zero denominator": (lambda: stats.ratio_of_means([1.0, 2.0], [0.0, 0.0]), math.nan, "denominator"),
    "denominator around zero": (
        lambda: stats.ratio_of_means(np.ones(30), np.random.default_rng(0).normal(size=30)),
        None,
        "denominator's mean includes 0",
    ),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_give_a_reason_and_no_interval(name):
    make, value, reason = DEGENERATE[name]
    estimate = make()
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)
    assert reason in estimate.reason
    if value is not None:
        assert estimate.value == pytest.approx(value, nan_ok=True)


MALFORMED = {
    "lengths": (lambda: stats.difference([1, 2], [1, 2, 3]), "b has 3 values; expected 2"),
    "group lengths": (lambda: stats.mean([1, 2], ["a"]), "groups has 1 values"),
    "nan": (lambda: stats.mean([1.0, math.nan]), "values holds 1 NaN or infinite values of 2"),
    "text": (lambda: stats.mean(["high", "low"]), "values is not numeric"),
    "table": (lambda: stats.mean([[1.0], [2.0]]), "values has shape"),
    "label": (lambda: stats.auroc([1.0, 2.0], [1, 2]), "label holds 2; expected booleans"),
    "missing group": (lambda: stats.mean([1, 2], ["a", None]), "groups holds 1 missing labels"),
    "mixed groups": (lambda: stats.mean([1, 2], ["a", 3]), "groups holds labels of mixed types"),
    "level": (lambda: stats.mean([1, 2], level=95.0), "level is 95"),
    "resamples": (lambda: stats.mean([1, 2], resamples=50), "50 resamples; expected at least 1000"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_input_is_a_typed_error(name):
    make, message = MALFORMED[name]
    with pytest.raises(DataError) as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_estimate_shows_itself_and_cannot_be_changed():
    estimate = stats.mean([True, False, True, True], ["a", "a", "b", "c"])
    assert repr(estimate).startswith("0.75 [")
    assert "95% interval, n=4 in 3 groups" in repr(estimate)
    assert "one group" in repr(stats.mean([1, 2], ["a", "a"]))
    with pytest.raises(AttributeError):
        estimate.value = 1.0  # type: ignore[misc]
