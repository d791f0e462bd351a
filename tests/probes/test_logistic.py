"""The shared decomposition against scikit-learn on the raw features, and against what the optimum must satisfy."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from interp_vlm.probes import nested
from interp_vlm.probes.logistic import C_PATH, PRECISION, Tall, Wide, _Model, reduce, solve
from interp_vlm.probes.measures import fold_auroc
from interp_vlm.probes.nested import score_fold

PATH = (1e-5, 1e-3, 1e-1, 10.0)


def examples(n: int, d: int, seed: int = 0):
    """Correlated features far from 0, of very different spread, and a noisy label."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, d)) * np.exp(-np.arange(d) / (d / 6))
    features = hidden @ np.linalg.qr(rng.normal(size=(d, d)))[0] * rng.lognormal(size=d) + 3.0
    label = rng.random(n) < 1.0 / (1.0 + np.exp(-4.0 * hidden[:, 0]))
    return features, label.astype(np.float64)


@pytest.mark.parametrize(("n", "d"), [(150, 20), (80, 200), (60, 60)])
@pytest.mark.parametrize("standardise", [True, False])
def test_coefficients_equal_scikit_learn_on_the_raw_features(n, d, standardise):
    features, label = examples(n, d)
    kept = (np.arange(n) % 5 != 0).astype(np.float64)
    reduced = reduce(torch.tensor(features), standardise=standardise)
    columns = [torch.tensor(column)[:, None].expand(-1, len(PATH)) for column in (label, kept)]
    weights, intercepts = reduced.raw(*solve(reduced, *columns, torch.tensor(PATH, dtype=torch.float64)))
    centre = StandardScaler(with_std=standardise).fit(features)  # over all rows, as the outer training part is
    spread = centre.scale_ if standardise else np.ones(d)
    for column, C in enumerate(PATH):
        model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000)
        model.fit(centre.transform(features)[kept > 0], label[kept > 0])
        expected = model.coef_[0] / spread
        np.testing.assert_allclose(weights[:, column], expected, atol=2e-6 * np.abs(expected).max())
        intercept = model.intercept_[0] - centre.mean_ @ expected
        assert intercepts[column].item() == pytest.approx(intercept, abs=1e-5 * max(1.0, abs(intercept)))


def test_the_gradient_vanishes_for_separable_labels_and_hardly_any_penalty():
    features, label = examples(40, 100)
    reduced = reduce(torch.tensor(features))
    one = torch.ones(40, 1, dtype=torch.float64)
    a, b = solve(reduced, torch.tensor(label)[:, None], one, torch.tensor([1e4], dtype=torch.float64))
    error = torch.sigmoid(reduced.times(a) + b) - torch.tensor(label)[:, None]
    assert float((reduced.rows.T @ (error + a / 1e4)).abs().max()) < 1e-4
    assert abs(float(error.sum())) < 1e-5
    assert float(error.abs().max()) < 0.01


def test_problems_do_not_disturb_each_other():
    features, label = examples(60, 30)
    reduced = reduce(torch.tensor(features))
    others = torch.tensor(np.random.default_rng(1).random((60, 5)) < 0.5).double()
    labels = torch.cat([torch.tensor(label)[:, None], others], 1)
    strengths = torch.tensor([1.0, 1e-4, 1e-2, 1.0, 10.0, 100.0], dtype=torch.float64)
    together = solve(reduced, labels, torch.ones_like(labels), strengths)
    alone = solve(reduced, labels[:, :1], torch.ones(60, 1, dtype=torch.float64), strengths[:1])
    torch.testing.assert_close(reduced.raw(*together)[0][:, :1], reduced.raw(*alone)[0], rtol=0, atol=1e-7)


def test_constant_and_repeated_features_are_harmless():
    features, label = examples(50, 10)
    padded = np.concatenate([features, features, np.full((50, 3), 0.1)], axis=1)
    reduced = reduce(torch.tensor(padded))
    column, one = torch.tensor(label)[:, None], torch.ones(50, 1, dtype=torch.float64)
    weights, _ = reduced.raw(*solve(reduced, column, one, one[0]))
    torch.testing.assert_close(weights[:10], weights[10:20])
    assert float(weights[20:].abs().max()) < 1e-9


@pytest.mark.parametrize(("n", "d"), [(200, 20), (120, 300)])
def test_a_fold_equals_a_plain_grid(n, d):
    """Choice of C by inner log loss, refit, test scores: each done by scikit-learn on the raw features, one by one."""
    features, label = examples(n, d, seed=3)
    train, test = np.arange(n) % 4 != 0, np.arange(n) % 4 == 0
    inner = np.random.default_rng(0).permutation(np.arange(train.sum()) % 3)
    parts = [torch.tensor(features[rows]) for rows in (train, test)]
    found = score_fold(*parts, label[train, None], inner, PATH)

    scaler = StandardScaler().fit(features[train])
    x, y = scaler.transform(features[train]), label[train]
    losses, aurocs = [], []
    for C in PATH:
        logits = np.empty(len(y))
        for fold in range(3):
            model = LogisticRegression(C=C, tol=1e-8, max_iter=10000).fit(x[inner != fold], y[inner != fold])
            logits[inner == fold] = model.decision_function(x[inner == fold])
        losses.append(log_loss(y, 1.0 / (1.0 + np.exp(-logits))))
        aurocs.append(fold_auroc(logits[:, None], y > 0.5, inner)[0])
    best = int(np.argmin(losses))
    assert found.chosen[0] == best
    assert found.inner_auroc[0] == pytest.approx(aurocs[best], abs=1e-3)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=PATH[best], tol=1e-8, max_iter=10000))
    expected = model.fit(features[train], y).decision_function(features[test])
    np.testing.assert_allclose(found.test[:, 0], expected, atol=1e-3 * np.abs(expected).max())
    assert roc_auc_score(label[test], found.test[:, 0]) == pytest.approx(roc_auc_score(label[test], expected), abs=1e-3)


def test_the_test_part_has_no_say_in_its_own_standardisation():
    features, label = examples(80, 10)
    inner = np.arange(60) % 3
    train, test = torch.tensor(features[:60]), torch.tensor(features[60:])
    alone = score_fold(train, test[:1], label[:60, None], inner, PATH).test
    with_others = score_fold(train, torch.cat([test[:1], test[1:] * 1e3]), label[:60, None], inner, PATH).test
    np.testing.assert_allclose(alone[0], with_others[0], rtol=1e-9)


@pytest.mark.parametrize("n", [90, 700])
def test_single_precision_is_precise_enough(n):
    """Wide layers in float32 against themselves in float64, from hardly any weight to classes that separate."""
    features, label = examples(n, 600, seed=2)
    path = torch.tensor([1e-5, 1e-3, 1e-1, 10.0], dtype=torch.float64)
    labels = torch.tensor(label)[:, None].expand(-1, 4)
    short, long = (reduce(torch.tensor(features, dtype=kind)) for kind in (torch.float32, torch.float64))
    assert isinstance(short, Wide)
    assert short.rows.dtype == torch.float32
    found, exact = (each.times(solve(each, labels, torch.ones_like(labels), path)[0]) for each in (short, long))
    np.testing.assert_array_less((found - exact).abs().amax(0), 5e-3 * exact.std(0))


@pytest.mark.parametrize(("n", "d", "kind"), [(120, 30, Tall), (60, 200, Wide)])
def test_examples_that_occur_twice_count_twice(n, d, kind):
    features, label = examples(n, d)
    once, twice = reduce(torch.tensor(features)), reduce(torch.tensor(np.tile(features, (2, 1))))
    assert isinstance(once, kind)
    assert isinstance(twice, kind)
    y, C = torch.tensor(label)[:, None], torch.tensor([0.1], dtype=torch.float64)
    single, _ = once.raw(*solve(once, y, 2.0 * torch.ones_like(y), C))
    double, _ = twice.raw(*solve(twice, y.repeat(2, 1), torch.ones(2 * n, 1), C))
    torch.testing.assert_close(single, double, rtol=0, atol=1e-5 * float(single.abs().max()))


@pytest.mark.parametrize(("n", "d"), [(60, 20), (40, 200)])
def test_one_class_gives_finite_scores_of_that_class(n, d):
    """Inner folds of random labels may hold one class; without a penalty on the intercept its scores only grow."""
    reduced = reduce(torch.tensor(examples(n, d)[0]))
    one = torch.ones(n, 2, dtype=torch.float64)
    a, b = solve(reduced, one * torch.tensor([0.0, 1.0]), one, torch.tensor([1e-5, 10.0]))
    scores = reduced.times(a) + b
    assert torch.isfinite(scores).all()
    assert float(scores[:, 0].max()) < -10.0
    assert float(scores[:, 1].min()) > 10.0


def test_a_good_start_changes_nothing():
    features, label = examples(80, 200)
    reduced = reduce(torch.tensor(features))
    y, C = torch.tensor(label)[:, None], torch.tensor([1.0], dtype=torch.float64)
    near = solve(reduced, y, torch.ones_like(y), 0.5 * C)
    cold, warm = (reduced.raw(*solve(reduced, y, torch.ones_like(y), C, start))[0] for start in (None, near))
    torch.testing.assert_close(cold, warm, rtol=0, atol=1e-5 * float(cold.abs().max()))


def test_a_problem_that_is_done_waits_for_the_others():
    """Only the intercept moves: what is left for the coefficients is rounding, of either sign."""
    features, label = examples(120, 300)
    reduced = reduce(torch.tensor(features, dtype=torch.float32))
    weight = torch.rand(120, 17, generator=torch.Generator().manual_seed(0)) / 4.0
    pull = weight.clone()
    pull[:, -1] = torch.tensor(label).float() - 0.5  # the one they wait for

    def step(columns: slice) -> tuple[torch.Tensor, ...]:
        part = pull[:, columns], weight[:, columns], torch.full((17,), 0.1)[columns]
        return reduced.step(_Model(*part, PRECISION[torch.float32]), torch.zeros_like(part[0]))

    together, alone = step(slice(17)), step(slice(16, 17))
    for found, expected in zip(together, alone, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[..., -1:], expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("n", "d", "kind"), [(160, 20, torch.float64), (100, 250, torch.float64), (300, 600, torch.float32)]
)
@pytest.mark.parametrize("signal", [0.0, 2.0, 30.0])
def test_the_race_has_the_winner_of_solving_every_problem(n, d, kind, signal, monkeypatch):
    """From noise, where the smallest C wins, to classes that separate, where a large one does."""
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(n, d)) / np.sqrt(np.arange(1, d + 1))
    own = rng.random(n) < 1.0 / (1.0 + np.exp(-signal * hidden[:, 0]))
    targets = np.stack([own, rng.permutation(own)], axis=1).astype(np.float64)
    features = torch.tensor(hidden @ rng.normal(size=(d, d)), dtype=kind)
    half, inner = n // 2, np.arange(n // 2) % 4
    raced = score_fold(features[:half], features[half:], targets[:half], inner, C_PATH)
    monkeypatch.setattr(nested, "RACE", nested.RACE[-1:])
    full = score_fold(features[:half], features[half:], targets[:half], inner, C_PATH)
    assert raced.chosen.tolist() == full.chosen.tolist()
    np.testing.assert_allclose(raced.inner_auroc, full.inner_auroc, atol=2e-3)
    np.testing.assert_allclose(raced.test, full.test, atol=2e-3 * full.test.std())
