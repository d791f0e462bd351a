"""Risk and coverage against every order of ties, written out, and the coverage of the intervals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_vlm import stats
from interp_vlm.errors import DataError
from interp_vlm.stats.coverage import _statistic


def risks_of_every_order(score, correct):
    """Mean over all orders that sort the scores: the error rate among the first k, for each k."""
    n, curves = len(score), []
    for order in itertools.permutations(range(n)):
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order)):
            wrong = np.array([not correct[i] for i in order], dtype=float)
            curves.append(np.cumsum(wrong) / np.arange(1, n + 1))
    return np.mean(curves, axis=0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=6))
def test_ties_are_the_mean_over_all_their_orders(rows):
    score, correct = (np.array(column) for column in zip(*rows, strict=True))
    n, expected = len(score), risks_of_every_order(score, correct)
    found = stats.risk_coverage(score, correct, coverages=[k / n for k in range(1, n + 1)], resamples=1000)
    assert [estimate.value for estimate in found.risk] == pytest.approx(expected)
    assert found.area.value == pytest.approx(expected.mean())
    assert found.error.value == pytest.approx(1 - correct.mean())


def test_without_ties_it_is_the_textbook_curve():
    rng = np.random.default_rng(0)
    score = rng.normal(size=200)
    correct = rng.random(200) < 1 / (1 + np.exp(-2 * score))
    wrong = ~correct[np.argsort(-score)]
    found = stats.risk_coverage(score, correct, coverages=[0.1, 0.5, 0.875, 1.0])
    assert [e.value for e in found.risk] == pytest.approx([wrong[:k].mean() for k in (20, 100, 175, 200)])
    assert found.area.value == pytest.approx(np.mean([wrong[:k].mean() for k in range(1, 201)]))
    # of an answer that is cut, the share inside counts
    cut = stats.risk_coverage(score, correct, coverages=[0.0525]).risk[0]
    assert cut.value == pytest.approx((wrong[:10].sum() + 0.5 * wrong[10]) / 10.5)


def test_drawing_groups_equals_copying_their_rows():
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(12), 4)
    score, correct, shares = rng.integers(0, 5, 48).astype(float), rng.random(48) < 0.7, np.array([0.2, 0.7, 1.0])
    drawn = rng.multinomial(12, np.full(12, 1 / 12), size=15).astype(float)
    fast = _statistic(score, correct, codes, shares)(drawn)
    for counts, row in zip(drawn, fast, strict=True):
        rows = np.repeat(np.arange(48), counts[codes].astype(int))
        slow = stats.risk_coverage(score[rows], correct[rows], coverages=shares.tolist(), resamples=1000)
        assert row == pytest.approx([*(e.value for e in slow.risk), slow.area.value])


def test_a_perfect_a_useless_and_a_reversed_score():
    correct = np.arange(100) >= 25
    best, none, worst = (stats.risk_coverage(score, correct).area.value for score in (correct, [1.0] * 100, ~correct))
    assert none == pytest.approx(0.25)
    assert best < 0.04 < none < 0.5 < worst
    assert stats.risk_coverage([1.0] * 100, correct, coverages=[0.3]).risk[0].value == pytest.approx(0.25)


def test_intervals_hold_the_truth_in_93_to_97_percent():
    """Risk at half coverage and the area, of questions that share pictures; the truth from a sample of a million."""

    def sample(groups, rng):
        codes = np.repeat(np.arange(groups), 3)
        effect = 0.6 * rng.normal(size=groups)[codes]
        score = rng.normal(size=len(codes)) + effect
        return score, rng.random(len(codes)) < 1 / (1 + np.exp(-0.8 - 1.5 * score)), codes

    score, correct, _ = sample(250_000, np.random.default_rng(99))
    wrong = ~correct[np.argsort(-score)]
    truth = wrong[: len(wrong) // 2].mean(), (np.cumsum(wrong) / np.arange(1, len(wrong) + 1)).mean()
    rng, held, simulations = np.random.default_rng(0), np.zeros(2), 300
    for seed in range(simulations):
        found = stats.risk_coverage(*sample(40, rng), coverages=[0.5], resamples=1000, seed=seed)
        held += [e.low <= true <= e.high for e, true in zip((found.risk[0], found.area), truth, strict=True)]
    assert (held / simulations >= 0.93).all(), held
    assert (held / simulations <= 0.97).all(), held


def test_it_makes_a_table_and_a_figure():
    rng = np.random.default_rng(2)
    score = rng.normal(size=120)
    found = stats.risk_coverage(score, rng.random(120) < 1 / (1 + np.exp(-score)), np.arange(120) // 3)
    table = found.frame()
    assert list(table["coverage"]) == pytest.approx(np.arange(1, 11) / 10)
    assert (table["low"] <= table["risk"]).all()
    assert (table["risk"] <= table["high"]).all()
    line, error = found.plot().axes[0].lines
    assert np.asarray(line.get_ydata()) == pytest.approx(table["risk"].to_numpy())
    assert next(iter(error.get_ydata())) == found.error.value
    assert repr(found).startswith("RiskCoverage(area 0.")


def test_degenerate_and_malformed_data():
    right = stats.risk_coverage([0.1, 0.2, 0.3], [True] * 3)
    assert right.area.value == 0.0
    assert "no variance" in right.area.reason
    nothing = stats.risk_coverage([], [])
    assert math.isnan(nothing.area.value)
    assert nothing.risk[0].reason == "no observations"
    with pytest.raises(DataError, match="a coverage is 0; expected shares"):
        stats.risk_coverage([1.0, 2.0], [True, False], coverages=[0.0, 1.0])
    with pytest.raises(DataError, match="correct holds 2"):
        stats.risk_coverage([1.0, 2.0], [1, 2])
