"""Activations of stores are read layer by layer, with what the store knows of each example."""

import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import interp_vlm as iv
from interp_vlm.errors import DataError, ModelError
from interp_vlm.probes.inputs import Activations, read

QUICK: dict[str, Any] = {"permutations": 0, "resamples": 1000, "folds": 3, "inner_folds": 2}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    vlm = iv.load("testbed:llava")
    examples = iv.data.digit_scenes(n=72, difficulty="hard", questions_per_image=3)
    folder = tmp_path_factory.mktemp("stores") / "last"
    return vlm, examples, iv.store.write(folder, vlm, examples, ["resid_post", "mlp_out"], layers=[1, 3])


def test_a_store_gives_the_report_of_its_arrays(written):
    _, examples, store = written
    report = iv.probe_layers(iv.store.open(store.folder), site="resid_post", **QUICK)
    hidden = torch.stack([store.layer("resid_post", layer)[:, 0] for layer in (1, 3)], dim=1)
    index = store.index
    array = iv.probe_layers(
        hidden.float(),
        index["correct"].astype(bool),
        [example.group for example in examples],
        position="before_answer",
        layers=[1, 3],
        confidence=index["confidence"],
        answers=index["answer"].tolist(),
        questions=[example.question for example in examples],
        **QUICK,
    )
    np.testing.assert_array_equal(report.scores, array.scores)
    assert (report.layers, report.site, report.position) == ((1, 3), "resid_post", "before_answer")
    assert report.model == "testbed:llava"
    names = [found.name for found in report.baselines]
    assert names[:3] == ["output confidence", "answer only", "question only"]
    assert report.baseline_frame().equals(array.baseline_frame())
    one = iv.probe_layers(store, site="resid_post", layers=[3], **QUICK)
    np.testing.assert_array_equal(one.scores[0], report.scores[1])


def test_what_is_given_goes_before_what_the_store_knows(written):
    store = written[2]
    labels = np.arange(72) % 2 == 0
    report = iv.probe_layers(store, labels, np.arange(72), site="resid_post", layers=[1], **QUICK)
    np.testing.assert_array_equal(report.labels, labels)
    assert report.headline.groups == 72


def test_layers_are_read_one_at_a_time(written, monkeypatch):
    store, asked = written[2], []
    plain = type(store).layer

    def watched(self, site, layer, examples=None, position=None):
        asked.append((layer, examples is None))
        return plain(self, site, layer, examples, position)

    monkeypatch.setattr(type(store), "layer", watched)
    found = read(store, "mlp_out", None, None)
    assert not any(whole for _, whole in asked)  # the width is read from one example
    assert found.layer(3).shape == found.shape[::2]
    assert [layer for layer, whole in asked if whole] == [3]


def test_no_layer_outlives_its_fit(written, monkeypatch):
    store, seen = written[2], []
    plain = Activations.layer

    def watched(self, number):
        assert not [old for old in seen if old() is not None]
        values = plain(self, number)
        seen.append(weakref.ref(values))
        return values

    monkeypatch.setattr(Activations, "layer", watched)
    iv.probe_layers(store, site="mlp_out", **QUICK)
    kinds = (np.arange(72) // 3 % 2).tolist()
    iv.probe_transfer(store, None, None, kinds, site="mlp_out", folds=3, inner_folds=2, resamples=1000)
    assert len(seen) == 4


def test_one_of_several_positions(written, tmp_path):
    vlm, examples, _ = written
    store = iv.store.write(tmp_path, vlm, examples[:6], "resid_post", positions="question", layers=[3])
    counts = store.index["positions"].tolist()
    assert len(set(counts)) > 1
    hidden = store.layer("resid_post", 3)
    with pytest.raises(DataError, match=r"positions of each example .*; expected one; say which: position_index=-1"):
        read(store, None, None, None)
    for index in (-1, -2, 0, 2):
        expected = torch.stack([row[:count][index] for row, count in zip(hidden, counts, strict=True)])
        assert torch.equal(read(store, None, None, None, index).layer(3), expected.float())
    with pytest.raises(DataError, match=f"position_index=99, an example of the store holds {min(counts)} positions"):
        read(store, None, None, None, 99)


def test_a_monitor_takes_the_store_of_its_own_model_alone(written, tmp_path):
    vlm, examples, store = written
    report = iv.probe_layers(store, site="resid_post", **QUICK)
    assert report.monitor(store, vlm, layer=3).model == store.model
    twin = iv.load("testbed:llava")
    next(twin.model.parameters()).data += 0.01
    with pytest.raises(ModelError, match=r"the store .* was written by another model: weights '"):
        report.monitor(store, twin)
    elsewhere = iv.store.write(tmp_path, vlm, examples[:6], "resid_post", positions="question", layers=[1, 3])
    with pytest.raises(DataError, match="were not read at the last prompt token"):
        report.monitor(elsewhere, vlm)


def test_half_precision_is_raised_exactly(written):
    store = written[2]
    assert store.dtype == "float16"
    found = read(store, "resid_post", None, None).layer(1)
    assert found.dtype == torch.float32
    assert torch.equal(found, store.layer("resid_post", 1)[:, 0].float())


def test_what_a_store_does_not_hold_is_refused(written):
    store = written[2]
    with pytest.raises(DataError, match="the store holds 2 sites: resid_post, mlp_out; expected one; pass site="):
        iv.probe_layers(store)
    with pytest.raises(DataError, match="site 'z' is absent from the store; expected one of resid_post, mlp_out"):
        iv.probe_layers(store, site="z")
    with pytest.raises(DataError, match=r"layer 2 is absent from 'resid_post'; expected one of \[1, 3\]"):
        iv.probe_layers(store, site="resid_post", layers=[2])
    with pytest.raises(DataError, match="'after_answer' for a store of the prompt"):
        iv.probe_layers(store, site="resid_post", position="after_answer")
    with pytest.raises(DataError, match="labels has 5 values; expected 72"):
        iv.probe_layers(store, [True] * 5, site="resid_post")
    with pytest.raises(ModelError, match="testbed:paligemma"):
        iv.store.open(store.folder, iv.load("testbed:paligemma"))
    unscored = store.index.assign(correct=store.index["correct"].mask(np.arange(72) < 4))
    with pytest.raises(DataError, match=r"4 of 72 answers in the store .* have no score; .* give labels="):
        iv.probe_layers(dataclasses.replace(store, index=unscored), site="resid_post")


def test_arrays_know_neither_labels_nor_positions():
    hidden = np.zeros((4, 1, 2))
    with pytest.raises(DataError, match="labels are missing; expected True or False for each example; give labels="):
        iv.probe_layers(hidden, position="before_answer")
    with pytest.raises(DataError, match="position_index=0 for activations without a position axis"):
        iv.probe_layers(hidden, [True] * 4, position="before_answer", position_index=0)
