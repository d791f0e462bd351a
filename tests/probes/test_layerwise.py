"""Planted signals are found where they are; nothing is found where there is nothing; pictures do not leak."""

import numpy as np
import pytest
import torch

from interp_vlm.errors import DataError
from interp_vlm.interventions.cache import Cache
from interp_vlm.probes import probe_layers
from interp_vlm.stats import bootstrap

QUICK = {"position": "before_answer", "permutations": 0, "resamples": 1000, "folds": 4, "inner_folds": 3}


def planted(strengths, n=240, d=12, size=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.6
    hidden = rng.normal(size=(n, len(strengths), d))
    for layer, strength in enumerate(strengths):
        hidden[:, layer, 0] += strength * labels
    return hidden, labels, np.arange(n) // size


@pytest.fixture(scope="module")
def report():
    hidden, labels, groups = planted([0.0, 0.4, 1.2, 3.0, 2.9, 1.0])
    rng = np.random.default_rng(9)
    return probe_layers(
        hidden,
        labels,
        groups,
        position="after_answer",
        site="resid_post",
        layers=[4, 8, 12, 16, 20, 24],
        confidence=labels + rng.normal(size=240),
        answers=np.where(labels, "yes", "no").tolist(),
        questions=[f"is there a {word} ?" for word in rng.choice(list("abcdefgh"), 240)],
        answer_lengths=rng.integers(1, 5, 240),
        permutations=99,
    )


def test_a_planted_signal_is_found_in_its_layer(report):
    assert report.peak.value in (16, 20)
    assert report.onset.value in (16, 20)
    assert report.peak.low >= 16
    assert report.peak.high <= 20
    # two normals 3 apart: Phi(3 / sqrt(2))
    assert report.auroc[3].value == pytest.approx(0.983, abs=0.02)
    assert report.headline.low > 0.9
    assert set(report.chosen_layers) <= {16, 20}
    assert [estimate.p for estimate in report.auroc[2:]] == [0.01] * 4
    assert report.auroc[0].p > 0.05


def test_baselines_say_what_they_know(report):
    alone = report.baseline("answer only").auroc
    assert alone.value == 1.0  # the answers were made from the labels
    # with nothing to learn the sign learnt on the training part is wrong on the test part: at most 0.5, not about it
    assert report.baseline("question only").auroc.low < 0.5
    assert report.baseline("answer length").auroc.low < 0.5
    direct = bootstrap.auroc(report.baseline("output confidence").scores, report.labels, report.groups)
    assert report.baseline("output confidence").auroc == direct
    shuffled = report.baseline("shuffled labels").auroc
    assert shuffled.low < 0.5 < shuffled.high
    with pytest.raises(DataError, match="no baseline 'self-consistency'"):
        report.baseline("self-consistency")


def test_the_control_task_shows_a_probe_that_only_knows_the_question():
    rng = np.random.default_rng(0)
    types = rng.integers(0, 6, 240)
    hidden = rng.normal(size=(240, 2, 12)) * 0.1
    hidden[np.arange(240), 1, types] += 1.0
    labels = rng.random(240) < np.array([0.1, 0.9, 0.2, 0.8, 0.5, 0.5])[types]
    report = probe_layers(hidden, labels, np.arange(240) // 2, types=types.tolist(), **QUICK)
    assert report.auroc[1].value > 0.7
    assert report.control_values[1] > 0.95  # random labels of the types are learnt as well: not selective
    assert report.selectivity[1] < -0.05
    assert report.baseline("control task").auroc.value > 0.9


def test_a_probe_that_has_seen_the_answer_says_so(report):
    assert report.saw_answer
    assert "has seen the answer" in repr(report)
    hidden, labels, groups = planted([1.0])
    before = probe_layers(hidden, labels, groups, **QUICK)
    assert not before.saw_answer
    assert "has seen the answer" not in repr(before)


def test_tables_and_figure(report):
    frame = report.frame()
    assert frame["layer"].tolist() == [4, 8, 12, 16, 20, 24]
    assert frame["auroc"].tolist() == [estimate.value for estimate in report.auroc]
    assert {"p", "brier", "average_precision", "selectivity"} <= set(frame.columns)
    scores = report.score_frame()
    assert scores[scores.layer == 16]["logit"].tolist() == report.layer_scores(16).tolist()
    assert report.reliability(16)["n"].sum() == 240
    assert report.baseline_frame()["auroc"].tolist()[0] == report.headline.value
    lines = report.plot().axes[0].get_lines()
    assert lines[0].get_ydata().tolist() == frame["auroc"].tolist()
    assert "<table" in report._repr_html_()
    with pytest.raises(DataError, match="layer 5 was not probed"):
        report.layer_scores(5)


def test_what_identifies_the_picture_does_not_help():
    """Right or wrong belongs to the picture here, and features name the picture: only grouping keeps 0.5."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    hidden = np.repeat(rng.normal(size=(60, 1, 80)), 4, axis=0) + 0.05 * rng.normal(size=(240, 1, 80))
    labels = np.repeat(rng.random(60) < 0.5, 4)
    grouped = probe_layers(hidden, labels, groups, **QUICK).headline
    leaky = probe_layers(hidden, labels, None, **QUICK)
    assert grouped.low < 0.5 < grouped.high
    assert leaky.headline.value > 0.9
    assert any("own group" in note for note in leaky.notes)


def test_choosing_layer_and_C_does_not_inflate():
    values, best = [], []
    for seed in range(10):
        hidden, labels, groups = planted([0.0] * 6, n=120, d=20, seed=seed)
        report = probe_layers(hidden, labels, groups, seed=seed, **QUICK)
        values.append(report.headline.value)
        best.append(max(estimate.value for estimate in report.auroc))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 0.5) < 3.0 * error
    assert error < 0.04
    assert np.mean(best) > 0.54  # the peak of the same curves is what a careless reader would quote


def test_the_permutation_test_holds_its_level():
    """The smallest p over layers is uniform when there is nothing: 2.4 expected below 0.1 in 24."""
    few = 0
    for seed in range(24):
        hidden, labels, groups = planted([0.0] * 3, n=80, d=6, size=2, seed=seed)
        options = {**QUICK, "permutations": 39, "C": [0.1]}
        report = probe_layers(hidden, labels, groups, seed=seed, **options)
        few += min(estimate.p for estimate in report.auroc) <= 0.1
    assert few <= 7  # 1 in 400 by chance


def test_a_cache_is_read_with_its_layers_and_model():
    hidden, labels, groups = planted([0.0, 2.0, 0.0], n=120)
    values = torch.tensor(hidden, dtype=torch.float32)[:, :, None]
    mask = torch.ones(120, 1, dtype=torch.bool)
    cache = Cache({"resid_post": values}, {"resid_post": (0, 5, 9)}, mask.long(), mask, (), "testbed:llava")
    report = probe_layers(cache, labels, groups, **{**QUICK, "position": None})
    assert (report.layers, report.site, report.position) == ((0, 5, 9), "resid_post", "before_answer")
    assert report.model == "testbed:llava"
    assert report.peak.value == 5
    array = probe_layers(values[:, :, 0].numpy(), labels, groups, **QUICK)
    np.testing.assert_array_equal(array.scores, report.scores)
    one = probe_layers(cache, labels, groups, layers=[5], **{**QUICK, "position": None})
    np.testing.assert_array_equal(one.scores[0], report.scores[1])
    with pytest.raises(DataError, match="layer 7 is absent from 'resid_post'; expected one of"):
        probe_layers(cache, labels, groups, layers=[7])
    two = Cache(
        {"resid_post": values.expand(-1, -1, 2, -1)}, cache.layers, mask.expand(-1, 2).long(), mask.expand(-1, 2), ()
    )
    with pytest.raises(DataError, match="2 positions of each example; expected one; capture with positions='last'"):
        probe_layers(two, labels, groups)


def test_the_same_seed_gives_the_same_report():
    hidden, labels, groups = planted([0.5, 0.5], n=120)
    first, second = (probe_layers(hidden, labels, groups, seed=4, **{**QUICK, "permutations": 9}) for _ in range(2))
    assert first.frame().equals(second.frame())
    assert first.headline == second.headline


def broken(name):
    hidden, labels, groups = planted([0.0, 1.0], n=60)
    options = dict(QUICK)
    if name == "one class":
        labels = np.ones(60, dtype=bool)
    elif name == "few groups":
        groups = np.arange(60) % 3
    elif name == "rare class":
        labels = np.arange(60) != 7
    elif name == "nan":
        hidden[3, 1, 2] = np.nan
    elif name == "length":
        labels = labels[:50]
    elif name == "groups":
        groups = groups[:50]
    elif name == "position":
        options["position"] = None
    elif name == "shape":
        hidden = hidden[:, 0]
    elif name == "layers":
        options["layers"] = [3]
    elif name == "answers":
        options["answers"] = ["yes"] * 59
    elif name == "C":
        options["C"] = [0.0, 1.0]
    elif name == "strange":
        labels = np.arange(60) % 3
    return hidden, labels, groups, options


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one class", "one class only: all 60 are True; expected right and wrong answers; add"),
        ("few groups", "3 groups for 4 folds; expected at least 4 groups; add pictures, or pass folds=3"),
        ("rare class", "label False is found in 1 groups only; expected at least 4"),
        ("nan", "activations of layer 1 hold NaN or infinite values in 1 of 60 examples; expected finite"),
        ("length", "labels has 50 values; expected 60"),
        ("groups", "groups has 50 values; expected 60"),
        ("position", "position is None; expected 'before_answer' or 'after_answer'; say whether"),
        ("shape", r"activations have shape \(60, 12\); expected \(example, layer, feature\)"),
        ("layers", "layers names 1 layers .*, activations hold 2"),
        ("answers", "answers has 59 values; expected 60"),
        ("C", r"C is \[0.0, 1.0\]; expected positive"),
        ("strange", "labels holds 2; expected booleans"),
    ],
)
def test_bad_input_is_one_line_with_a_remedy(name, said):
    hidden, labels, groups, options = broken(name)
    with pytest.raises(DataError, match=said) as caught:
        probe_layers(hidden, labels, groups, **options)
    assert "\n" not in str(caught.value)
