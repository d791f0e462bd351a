"""Measures within folds against scikit-learn fold by fold; permutations of whole groups; onset."""

import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from interp_vlm.probes import measures
from interp_vlm.probes.folds import permuted, split, unmoved

OPTIONS = {"level": 0.95, "resamples": 1000, "seed": 0}


def scored(seed: int, n: int = 120, ties: bool = False):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.4
    scores = rng.normal(size=n) + labels
    return (np.round(scores) if ties else scores), labels, np.arange(n) % 3, np.arange(n) // 2


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_values_are_those_of_the_folds(seed, ties):
    scores, labels, folds, codes = scored(seed, ties=ties)
    parts = [(labels[folds == fold], scores[folds == fold]) for fold in range(3)]
    pairs = [part.sum() * (~part).sum() for part, _ in parts]
    expected = np.average([roc_auc_score(*part) for part in parts], weights=pairs)
    estimate = measures.auroc(scores, labels, folds, codes, **OPTIONS)
    assert estimate.value == pytest.approx(expected)
    assert measures.fold_auroc(scores[:, None], labels, folds)[0] == pytest.approx(expected)
    assert estimate.low < expected < estimate.high
    expected = np.average([average_precision_score(*part) for part in parts], weights=[p.sum() for p, _ in parts])
    assert measures.average_precision(scores, labels, folds, codes, **OPTIONS).value == pytest.approx(expected)
    expected = brier_score_loss(labels, 1.0 / (1.0 + np.exp(-scores)))
    assert measures.brier(scores, labels, codes, **OPTIONS).value == pytest.approx(expected)


def test_drawing_groups_equals_copying_their_rows():
    scores, labels, folds, codes = scored(5, ties=True)
    drawn = np.random.default_rng(0).integers(0, 4, (20, codes.max() + 1)).astype(float)
    fast = measures.auroc_statistic(scores, labels, folds, codes)(drawn)
    for counts, value in zip(drawn, fast, strict=True):
        rows = np.repeat(np.arange(len(scores)), counts[codes].astype(int))
        assert value == pytest.approx(measures.fold_auroc(scores[rows, None], labels[rows], folds[rows])[0])


def test_reliability_is_scikit_learns_calibration_curve():
    scores, labels, _, _ = scored(2, n=400)
    p = 1.0 / (1.0 + np.exp(-scores))
    observed, predicted = calibration_curve(labels, p, n_bins=10)
    table = measures.reliability(p, labels, 10)
    np.testing.assert_allclose([row["observed"] for row in table], observed)
    np.testing.assert_allclose([row["predicted"] for row in table], predicted)
    assert sum(row["n"] for row in table) == 400


def test_onset_is_ninety_percent_of_the_way():
    curves = np.array([[0.5, 0.859, 0.861, 0.9], [0.9, 0.2, 0.9, 0.9], [0.5, 0.4, 0.5, 0.3]])
    found = measures.onset(curves)
    assert found[:2].tolist() == [2.0, 0.0]
    assert math.isnan(found[2])


def test_folds_keep_groups_together():
    rng = np.random.default_rng(0)
    codes, labels = np.repeat(np.arange(40), 3), rng.random(120) < 0.3
    plan = split(labels, codes, 5, 4, seed=1)
    for fold in range(5):
        train, test = plan.parts(fold)
        assert not set(codes[train]) & set(codes[test])
        assert sorted([*train, *test]) == list(range(120))
        for inner in range(4):
            held = plan.inner[fold] == inner
            assert not set(codes[train][held]) & set(codes[train][~held])
            assert 0 < labels[train][held].sum() < held.sum()


def test_permutations_move_whole_groups_of_one_size():
    codes = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3])
    labels = np.array([True, False, True, True, False, False, True, True, False])
    seen = set()
    for seed in range(200):
        new = permuted(labels, codes, np.random.default_rng(seed))
        assert new[6:].tolist() == [True, True, False]
        seen.add(tuple(map(tuple, new[:6].reshape(3, 2).tolist())))
    assert len(seen) == 6  # the orders of three different pairs
    assert {tuple(sorted(pairs)) for pairs in seen} == {((False, False), (True, False), (True, True))}
    assert unmoved(codes) == 1
