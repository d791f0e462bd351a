"""Transfer between kinds: a shared direction carries over, an opposite one inverts, pictures never leak."""

import numpy as np
import pytest

from interp_vlm.errors import DataError
from interp_vlm.probes import probe_layers, probe_transfer

OPTIONS = {"position": "before_answer", "folds": 3, "inner_folds": 2, "resamples": 1000}


def two_kinds(n=240, seed=0):
    """Layer 0: the kinds share a direction; layer 1: they use it with opposite signs; each picture has both kinds."""
    rng = np.random.default_rng(seed)
    labels, kinds = rng.random(n) < 0.5, np.arange(n) % 2
    hidden = rng.normal(size=(n, 2, 8))
    hidden[:, 0, 2] += 2.5 * labels
    hidden[:, 1, 2] += 2.5 * labels * np.where(kinds == 0, 1.0, -1.0)
    return hidden, labels, np.arange(n) // 4, np.array(["exist", "count"])[kinds].tolist()


def test_shared_and_opposite_directions():
    report = probe_transfer(*two_kinds(), **OPTIONS)
    assert report.kinds == ("exist", "count")
    assert min(estimates[0].low for estimates in report.auroc.values()) > 0.8
    for fitted, tested in report.auroc:
        within = report.auroc[fitted, tested][1]
        assert within.low > 0.8 if fitted == tested else within.high < 0.2
    assert len(report.frame()) == 8
    assert report.plot().axes[0].get_xlabel() == "tested on"
    assert "exist -> count" in repr(report)


def test_a_picture_seen_with_another_kind_of_question_is_still_seen():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 4)
    hidden = np.repeat(rng.normal(size=(60, 1, 80)), 4, axis=0) + 0.05 * rng.normal(size=(240, 1, 80))
    labels, kinds = np.repeat(rng.random(60) < 0.5, 4), ["a", "b"] * 120
    grouped = probe_transfer(hidden, labels, groups, kinds, **OPTIONS)
    leaky = probe_transfer(hidden, labels, None, kinds, **OPTIONS)
    assert grouped.headline["a", "b"].low < 0.5
    assert leaky.headline["a", "b"].value > 0.9


def test_each_kind_alone_agrees_with_probe_layers():
    hidden, labels, groups, kinds = two_kinds()
    report = probe_transfer(hidden, labels, groups, kinds, **OPTIONS)
    mine = np.array(kinds) == "exist"
    alone = probe_layers(hidden[mine], labels[mine], groups[mine], permutations=0, **OPTIONS)
    assert report.auroc["exist", "exist"][0].value == pytest.approx(alone.auroc[0].value, abs=0.03)


def test_bad_kinds_are_refused():
    hidden, labels, groups, kinds = two_kinds()
    with pytest.raises(DataError, match="kinds has 10 values; expected 240"):
        probe_transfer(hidden, labels, groups, kinds[:10], **OPTIONS)
    with pytest.raises(DataError, match="kinds holds 1 kind; expected at least 2; use probe_layers"):
        probe_transfer(hidden, labels, groups, ["one"] * 240, **OPTIONS)
    with pytest.raises(DataError, match="label False of kind 'count' is found in 0 groups"):
        probe_transfer(hidden, labels | (np.array(kinds) == "count"), groups, kinds, **OPTIONS)
