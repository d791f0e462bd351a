"""The guarantees of thresholds, by simulation; the exact bound against SciPy; what cannot be promised is said."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom, binomtest

from interp_vlm.errors import DataError
from interp_vlm.probes.thresholds import precision_threshold, recall_threshold, threshold_sequence

SETS = 600  # simulated calibration sets


def questions(rng, pictures, size=1, spread=0.0, slope=1.0):
    """Scores, labels and pictures: the log-odds of being right rise with the score; `spread` is the picture's own."""
    groups = np.repeat(np.arange(pictures), size)
    latent = rng.normal(size=pictures)[groups] * spread + rng.normal(size=len(groups)) * (1.0 - spread)
    labels = rng.random(len(groups)) < expit(
        1.2 + slope * 2.0 * latent + 3.0 * spread * rng.normal(size=pictures)[groups]
    )
    return expit(1.2 + 2.0 * latent), labels, groups


def precision_at(thresholds, scores, labels):
    """The precision at each threshold in a population: a slow, obvious count."""
    return np.array([labels[scores >= t].mean() if (scores >= t).any() else 1.0 for t in thresholds])


def allowed(share, trials):
    """The most violations that chance explains (1 in 1,000) when the guarantee holds exactly."""
    return binom.ppf(0.999, trials, share)


@pytest.mark.parametrize(
    ("slope", "wanted"), [(1.0, 0.9), (1.0, 0.85), (0.0, 0.78)], ids=["good", "lenient", "useless"]
)
def test_precision_holds_in_the_stated_share_of_calibration_sets(slope, wanted):
    rng = np.random.default_rng(1)
    population = questions(rng, 200_000, slope=slope)[:2]
    sequence = threshold_sequence(questions(rng, 500, slope=slope)[0], 250, wanted)
    known = dict(zip(sequence.tolist(), precision_at(sequence, *population), strict=True))
    assert any(value < wanted for value in known.values())  # some thresholds are wrong ones
    violations = found = 0
    for _ in range(SETS):
        scores, labels, _ = questions(rng, 250, slope=slope)
        try:
            threshold = precision_threshold(scores, labels, wanted, sequence=sequence, confidence=0.9)
        except DataError:
            continue
        found += 1
        violations += known[threshold.value] < wanted
    assert violations <= allowed(0.1, SETS)
    if slope:
        assert found > SETS / 2  # and it is no empty promise


def test_searching_without_a_plan_would_break_the_promise():
    """Negative control: the lowest of many thresholds whose observed precision reaches the wanted one."""
    rng = np.random.default_rng(2)
    population = questions(rng, 100_000)[:2]
    sequence = threshold_sequence(questions(rng, 500)[0], 250, 0.9)
    known = precision_at(sequence, *population)
    violations = 0
    for _ in range(SETS):
        scores, labels, _ = questions(rng, 250)
        reaching = np.flatnonzero(precision_at(sequence, scores, labels) >= 0.9)
        violations += len(reaching) > 0 and known[reaching[-1]] < 0.9
    assert violations > allowed(0.1, SETS)


def test_questions_about_one_picture_are_not_independent():
    """With the pictures the promise holds; taken as independent, eight questions a picture break it."""
    rng = np.random.default_rng(3)
    population = questions(rng, 40_000, 8, spread=0.9)[:2]
    sequence = threshold_sequence(questions(rng, 400, 8, spread=0.9)[0], 120, 0.85)
    known = dict(zip(sequence.tolist(), precision_at(sequence, *population), strict=True))
    violations = {"pictures": 0, "questions": 0}
    for draw in range(SETS):
        scores, labels, groups = questions(rng, 120, 8, spread=0.9)
        for name, own in (("pictures", groups), ("questions", None)):
            try:
                found = precision_threshold(scores, labels, 0.85, sequence=sequence, groups=own, seed=draw)
            except DataError:
                continue
            assert found.n == (120 if name == "pictures" else 960)
            violations[name] += known[found.value] < 0.85
    assert violations["pictures"] <= allowed(0.1, SETS)
    assert violations["questions"] > allowed(0.1, SETS)


@pytest.mark.parametrize("of", ["right", "wrong"])
def test_recall_holds_on_average_over_calibration_sets(of):
    rng = np.random.default_rng(4)
    kept = []
    for draw in range(SETS):
        scores, labels, groups = questions(rng, 60, 4, spread=0.7)
        threshold = recall_threshold(scores, labels, 0.8, of=of, groups=groups, seed=draw).value
        scores, labels, groups = questions(rng, 60, 4, spread=0.7)
        own = labels == (of == "right")
        # one question of that class of each new picture, as the guarantee says
        rows = rng.permutation(np.flatnonzero(own))
        rows = rows[np.unique(groups[rows], return_index=True)[1]]
        kept.append(np.mean((scores[rows] >= threshold) == (of == "right")))
    error = np.std(kept) / np.sqrt(SETS)
    assert np.mean(kept) >= 0.8 - 3 * error
    assert np.mean(kept) <= 0.8 + 0.03 + 3 * error  # and no more is given away than the correction asks


def test_recall_is_the_corrected_quantile():
    scores = np.arange(1, 100) / 100.0
    right = np.ones(99, dtype=bool)
    # 99 right ones: floor(0.1 * 100) = the 10th smallest
    assert recall_threshold(scores, right, 0.9).value == 0.1
    assert recall_threshold(scores[:8], right[:8], 0.9).value == 0.0  # too few to give up any
    wrong = recall_threshold(scores, ~right, 0.9, of="wrong")
    assert wrong.value == np.nextafter(0.9, 1.0)
    assert wrong.observed == pytest.approx(90 / 99)
    with pytest.raises(DataError, match=r"8 pictures .* expected at least 9 of them; .* at most 0.889"):
        recall_threshold(scores[:8], ~right[:8], 0.9, of="wrong")
    with pytest.raises(DataError, match="no wrong answer among 99"):
        recall_threshold(scores, right, 0.9, of="wrong")


def test_the_bound_is_that_of_clopper_and_pearson():
    rng = np.random.default_rng(5)
    scores, labels, _ = questions(rng, 400)
    found = precision_threshold(scores, labels, 0.8, sequence=[0.9, 0.7, 0.6], confidence=0.95)
    inside = scores >= found.value
    exact = binomtest(int(labels[inside].sum()), int(inside.sum()), alternative="greater").proportion_ci(0.95)
    assert found.low == pytest.approx(exact.low)
    assert found.low >= 0.8
    assert (found.accepted, found.n, found.coverage) == (inside.sum(), 400, inside.mean())
    assert found.observed == labels[inside].mean()


def test_it_stops_at_the_first_failure():
    scores = np.repeat([0.9, 0.5, 0.1], 200)
    labels = np.concatenate([np.ones(200), np.zeros(40), np.ones(160), np.ones(200)]).astype(bool)
    # all right from 0.9 on, 90 % from 0.5 on, 93 % from 0.1 on: the last is never looked at
    found = precision_threshold(scores, labels, 0.91, sequence=[0.9, 0.5, 0.1], confidence=0.9)
    assert (found.value, found.tested) == (0.9, 2)
    assert precision_threshold(scores, labels, 0.91, sequence=[0.1], confidence=0.9).value == 0.1


def test_the_sequence_begins_where_two_errors_would_pass():
    reference = np.random.default_rng(6).random(5000)
    sequence = threshold_sequence(reference, 400, 0.95, confidence=0.9)
    assert np.all(np.diff(sequence) < 0)
    assert sequence[-1] == 0.0
    accepted = round(400 * np.mean(reference >= sequence[0]))
    assert binom.cdf(2, accepted, 0.05) <= 0.1 < binom.cdf(2, accepted - 2, 0.05)
    assert threshold_sequence(reference, 20, 0.95).max() < 0.01  # with so few nothing but everything is worth a test


def test_what_cannot_be_promised_is_said():
    rng = np.random.default_rng(7)
    scores, labels, groups = questions(rng, 50, 3, slope=0.0)
    with pytest.raises(
        DataError, match=r"precision of 0.99 with confidence 0.9 on 50 pictures: .* which promises 0\.\d+"
    ):
        precision_threshold(scores, labels, 0.99, sequence=[0.5, 0.0], groups=groups)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"precision": 1.0}, "level is 1.0"),
        ({"confidence": 0.0}, "level is 0.0"),
        ({"sequence": [0.1, 0.5]}, "does not fall"),
        ({"sequence": []}, "does not fall"),
        ({"scores": [0.5, 1.5, 0.2, 0.1]}, "from 0.1 to 1.5"),
        ({"scores": [0.5, np.nan, 0.2, 0.1]}, "NaN"),
        ({"labels": [True, False]}, "2 values"),
        ({"labels": [1, 2, 0, 1]}, "holds 2"),
        ({"groups": ["a", "b"]}, "2 values"),
        ({"scores": [], "labels": [], "groups": []}, "none at all"),
    ],
    ids=["precision", "confidence", "rising", "empty", "range", "nan", "length", "classes", "groups", "nothing"],
)
def test_malformed_input_is_named(change, named):
    arguments = {
        "scores": [0.9, 0.8, 0.2, 0.1], "labels": [True, True, False, True], "precision": 0.5, "sequence": [0.5, 0.0],
        "confidence": 0.9, "groups": ["a", "b", "c", "d"],
    }  # fmt: skip
    with pytest.raises(DataError, match=named):
        precision_threshold(**{**arguments, **change})


def test_recall_of_something_else():
    with pytest.raises(DataError, match="'right' or 'wrong'"):
        recall_threshold([0.5], [True], 0.9, of="both")
