"""Bypassed layers: against a model whose own modules give zero, and every number of the table."""

from __future__ import annotations

import pytest
import torch

import interp_vlm as iv
from interp_vlm import stats
from interp_vlm.data.digits import digit_scenes
from interp_vlm.study.bypass import BYPASS, matched
from interp_vlm.study.experiment import Bench
from interp_vlm.study.material import Shard
from interp_vlm.study.sections import bypass as words
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import where

N = 18
SETTINGS = Settings(models=("testbed:llava",), limit=N)
SHARD = Shard(0, "standard", tuple(digit_scenes("test", N, 0)))


@pytest.fixture(scope="module")
def vlm():
    return iv.load("testbed:llava")


@pytest.fixture(scope="module")
def rows(vlm):
    return BYPASS.measure(Bench(vlm, SETTINGS), SHARD)


@pytest.fixture(scope="module")
def table(rows):
    return BYPASS.summarise(rows, SETTINGS)


def test_the_matched_layer_is_the_published_one_where_the_depth_is():
    assert [matched(count) for count in (28, 18, 32, 4, 1)] == [25, 16, 29, 3, 0]


@pytest.mark.parametrize(("part", "layer"), [("mlp", 0), ("mlp", 3), ("attention", 1)])
def test_answers_are_those_of_a_model_whose_module_adds_nothing(vlm, rows, part, layer):
    """The slow, obvious way: Hugging Face's model, with the last matrix of the module set to zero."""
    other = iv.load("testbed:llava")
    block = other.model.model.language_model.layers[layer]
    with torch.no_grad():
        (block.mlp.down_proj if part == "mlp" else block.self_attn.o_proj).weight.zero_()
    batch = other.encode([e.image for e in SHARD.examples], [e.question for e in SHARD.examples])
    expected = [str(answer) for answer in other.run(batch).answers]
    own = where(rows, part=part, layer=layer)
    assert list(own["answer"]) == expected
    clean = where(rows, part="none")
    assert list(own["flipped"]) == [a != b for a, b in zip(expected, clean["answer"], strict=True)]
    assert (own["correct"] == (own["answer"] == own["expected"])).all()


def test_table(rows, table):
    clean = where(rows, part="none").set_index("example")
    assert not table.duplicated(["part", "layer", "at", "quantity"]).any()
    assert len(where(table, at="each", quantity="change of accuracy")) == 8
    for _, line in table.iterrows():
        own = where(rows, part=line["part"], layer=line["layer"]).set_index("example").loc[clean.index]
        change = own["correct"].astype(float) - clean["correct"].astype(float)
        if line["quantity"] in ("change of accuracy", "equivalence within 5 points"):
            assert line["value"] == pytest.approx(100 * change.mean())
        elif line["quantity"] == "accuracy":
            assert line["value"] == pytest.approx(100 * own["correct"].mean())
        elif line["quantity"] == "answers that flip":
            assert line["value"] == pytest.approx(100 * own["flipped"].mean())
        if line["quantity"] == "equivalence within 5 points" and change.any():
            assert line["p"] == pytest.approx(stats.equivalence(change, 0.05, own["group"]).p)
        if line["quantity"] == "smallest detectable effect" and change.any():
            assert line["value"] > 0
        independent = line["quantity"].endswith("exact McNemar")
        assert (line["n"], line["groups"]) == (N, N if independent else clean["group"].nunique())
    late = where(table, at="matched")
    assert set(late["layer"]) == {3}
    each = where(table, at="each", layer=3).set_index(["part", "quantity"])["value"]
    again = late.set_index(["part", "quantity"])["value"]
    assert again.to_dict() == pytest.approx(each.to_dict(), nan_ok=True)


def test_attention_of_the_first_layer_is_needed(table):
    """The control: what the model cannot do without must show."""
    row = where(table, part="attention", layer=0, at="each", quantity="change of accuracy").iloc[0]
    assert row["high"] < -20


def test_section(table):
    section = words.section(table.assign(model="llava"), ["llava"])
    assert len(section.panels) == 1
    assert len(section.points) == 1
    same = where(table, at="matched", part="mlp", quantity="equivalence within 5 points")["p_holm"].iloc[0]
    assert ("the MLP in llava" in section.answer) == (same < 0.05)
    assert all(len(line) == 4 for line in section.table[1])
