"""L1 logistic regression by its optimality conditions; stability selection on planted neurons; the MLP."""

import numpy as np
import pytest

from interp_vlm.errors import DataError
from interp_vlm.probes import probe_layers
from interp_vlm.probes.sparse import l1_logistic, stable_neurons


def planted(n=240, d=40, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d))
    drive = 1.5 * features[:, 3] - 1.5 * features[:, 11]
    return features, rng.random(n) < 1.0 / (1.0 + np.exp(-drive)), np.arange(n) // 2


def test_the_l1_fit_satisfies_the_optimality_conditions():
    features, labels, _ = planted()
    penalty = 0.05
    model = l1_logistic(1.0 / (penalty * len(labels))).fit(features, labels)
    error = model.predict_proba(features)[:, 1] - labels
    gradient = features.T @ error / len(labels)
    w = model.coef_[0]
    assert 2 <= np.count_nonzero(w) < 40
    np.testing.assert_allclose(gradient[w != 0], -penalty * np.sign(w[w != 0]), atol=1e-3)
    assert np.abs(gradient[w == 0]).max() <= penalty + 1e-3


def test_planted_neurons_are_stable_and_noise_is_not():
    features, labels, groups = planted()
    found = stable_neurons(features, labels, groups, penalty=0.08, draws=40)
    assert sorted(found.units) == [3, 11]
    assert found.coefficient[3] > 0 > found.coefficient[11]
    assert found.top(2) == found.units
    assert found.frame()["unit"].tolist()[:2] == found.units
    noise = stable_neurons(features, np.random.default_rng(5).random(240) < 0.5, groups, penalty=0.08, draws=40)
    assert len(noise.units) <= max(1.0, 3 * noise.expected_false)


def test_bad_input_is_refused():
    features, labels, groups = planted()
    with pytest.raises(DataError, match=r"threshold 0\.4"):
        stable_neurons(features, labels, groups, threshold=0.4)
    with pytest.raises(DataError, match="both classes in at least 4 groups"):
        stable_neurons(features, labels | True, groups)
    found = stable_neurons(features, labels, groups, penalty=0.2, draws=5)
    with pytest.raises(DataError, match=r"40 neurons asked for, .* lower the penalty"):
        found.top(40)


@pytest.mark.parametrize("probe", ["l1", "mlp"])
def test_the_other_probes_find_the_planted_layer(probe):
    features, labels, groups = planted()
    hidden = np.stack([np.random.default_rng(1).normal(size=features.shape), features * [1.0] * 40], axis=1)
    options = {"position": "before_answer", "folds": 3, "inner_folds": 2, "resamples": 1000, "C": [0.01, 0.1]}
    report = probe_layers(hidden, labels, groups, probe=probe, **options)
    assert report.peak.value == 1
    assert report.headline.low > 0.5
    assert report.auroc[0].low < 0.5
    assert report.auroc[0].p is None
    assert probe in repr(report)


def test_an_unknown_probe_is_refused():
    features, labels, groups = planted()
    with pytest.raises(DataError, match="probe is 'svm'; expected one of 'l2', 'l1', 'mlp'"):
        probe_layers(features[:, None], labels, groups, position="before_answer", probe="svm")
