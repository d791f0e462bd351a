"""Every number of the tables against a slow, obvious recomputation from the rows of the examples."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import roc_auc_score

from interp_vlm.data.digits import digit_pairs, digit_scenes
from interp_vlm.study.masking import MAIN
from interp_vlm.study.tables import COLUMNS, where
from tests.study.conftest import SMALL

EXPERIMENTS = ("accuracy", "signals", "masking", "knockout", "patching")
MODELS = ("llava", "paligemma")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_table_is_tidy_and_says_how_each_number_came_about(table, study, name):
    found = table(name)
    assert set(COLUMNS) <= set(found.columns)
    assert list(dict.fromkeys(found["model"])) == list(MODELS)
    own = [column for column in found.columns if column not in COLUMNS]
    assert not found.duplicated([*own, "quantity", "compared"]).any()
    assert (found["n"] > 0).all()
    assert (found["groups"] > 0).all()
    assert (found["method"] != "").all()
    intervals = found[found["low"].notna()]
    assert len(intervals) > len(found) / 2
    assert (intervals["low"] <= intervals["value"] + 1e-9).all()
    assert (intervals["value"] <= intervals["high"] + 1e-9).all()
    # a number without an interval says why
    assert (found[found["low"].isna() & found["value"].isna()]["note"] != "").all()
    tested = found[found["p"].notna()]
    assert (tested["p_holm"] >= tested["p"]).all()
    written = pd.read_csv(study / "tables" / f"{name}.csv", keep_default_na=False)
    assert list(written.columns) == list(found.columns)
    assert np.allclose(pd.to_numeric(written["value"]), found["value"].astype(float), equal_nan=True, rtol=1e-12)


def test_every_example_is_there_once(examples):
    for condition, n in (("standard", SMALL.n), ("hard", 4 * SMALL.n)):
        expected = [example.id for example in digit_scenes("test", n, SMALL.seed, condition)]
        for model in MODELS:
            rows = where(examples("accuracy"), model=model, condition=condition)
            assert list(rows["example"]) == expected
    pairs = where(examples("patching"), model="llava", direction="noising", positions="last", layer=0)
    assert list(pairs["example"]) == [pair.clean.id for pair in digit_pairs("test", SMALL.n // 4, SMALL.seed)]


def test_accuracy(table, examples):
    rows, found = examples("accuracy"), where(table("accuracy"), quantity="accuracy")
    assert (rows["correct"] == (rows["answer"] == rows["expected"])).all()
    for _, line in found.iterrows():
        part = rows[(rows["model"] == line["model"]) & (rows["condition"] == line["condition"])]
        part = part if line["kind"] == "all" else part[part["kind"] == line["kind"]]
        if line["category"]:
            part = part[part["category"] == line["category"]]
        assert line["value"] == pytest.approx(100 * (part["answer"] == part["expected"]).mean())
        assert (line["n"], line["groups"]) == (len(part), part["group"].nunique())
        if not line["category"]:
            best = sum(kind["expected"].value_counts().max() for _, kind in part.groupby("kind"))
            assert line["baseline"] == pytest.approx(100 * best / len(part))
    standard = where(found, condition="standard", kind="all")
    assert (standard["value"] > standard["baseline"] + 20).all()


def test_signals(table, examples):
    rows, found = examples("signals"), table("signals")
    checked, changes = 0, []
    for _, line in found.iterrows():
        if line["quantity"] == "attention sinks on the picture":
            assert line["value"] == 0
            continue
        own = where(rows, model=line["model"], sinks=line["sinks"] or "with")
        part = own[own["layer"] == line["layer"]]
        if line["quantity"].startswith("change of H_s"):
            before = 0 if "first quarter" in line["quantity"] else line["layer"] - 1
            means = own.groupby("layer")["entropy"].mean()
            assert line["value"] == pytest.approx(means[line["layer"]] - means[before])
            assert (line["n"], line["groups"]) == (len(part), part["group"].nunique())
            changes.append((line["quantity"], line["layer"]))
            continue
        part = part if line["kind"] == "all" else part[part["kind"] == line["kind"]]
        score, right = part[line["measure"]].to_numpy(dtype=float), part["correct"].to_numpy(dtype=bool)
        if line["quantity"].startswith("AUROC"):
            assert line["value"] == pytest.approx(roc_auc_score(right, score))
        elif line["quantity"] == "point-biserial correlation":
            assert line["value"] == pytest.approx(pearsonr(score, right).statistic)
        else:
            wanted = right if line["quantity"] == "mean where right" else ~right
            assert line["value"] == pytest.approx(score[wanted].mean())
            assert line["n"] == wanted.sum()
        checked += 1
    assert checked > 100
    depth = [("change of H_s over the first quarter of layers", 1), ("change of H_s at the last layer", 3)]
    assert changes == 2 * [*depth, *(("change of H_s from the layer before", layer) for layer in (1, 2, 3))]


def test_masking(table, examples):
    rows, found = where(examples("masking"), **MAIN), where(table("masking"), **MAIN)
    for _, line in found.iterrows():
        part = rows[rows["model"] == line["model"]]
        part = part if line["kind"] == "all" else part[part["kind"] == line["kind"]]
        share = {mask: 100 * some["correct"].mean() for mask, some in part.groupby("mask")}
        if line["quantity"] == "accuracy":
            expected = share["none"]
        elif line["quantity"] == "change of accuracy":
            expected = share[line["mask"]] - share["none"]
        elif line["quantity"] == "change beyond random":
            expected = share[line["mask"]] - share["random"]
        elif line["quantity"] == "change of accuracy, one draw":
            one = part[(part["mask"] == "random") & (part["draw"] == int(line["draw"]))]
            expected = 100 * one["correct"].mean() - share["none"]
        else:
            expected = 0.0
        assert line["value"] == pytest.approx(expected)
        assert line["n"] == part["example"].nunique()
    counts = rows.groupby("mask")["masked"].agg(["min", "max"])
    tokens = 49
    assert (counts.loc[["top", "top without sinks", "random", "bottom"]] == math.ceil(0.3 * tokens)).all(axis=None)
    assert (counts.loc["all"] == tokens).all()
    assert set(rows.loc[rows["mask"] == "random", "draw"]) == set(range(SMALL.draws))


def test_masking_finds_what_the_answers_rest_on(table):
    """The controls: attended patches cost much more than random ones, the least attended next to nothing."""
    for model in MODELS:
        rows = where(table("masking"), model=model, kind="all", quantity="change of accuracy", **MAIN)
        costs = rows.set_index("mask")["value"]
        assert costs["top"] < costs["random"] - 10 < costs["bottom"]
        assert costs["bottom"] > -10


def test_knockout(table, examples):
    rows, found = examples("knockout"), table("knockout")
    assert (rows["mass_left"] == 0).all()
    assert np.allclose(rows["change"], 100 * (rows["after"] - rows["before"]) / rows["before"], atol=1e-3)
    for _, line in found.iterrows():
        if line["quantity"] == "largest attention left on a blocked edge":
            assert line["value"] == 0
            continue
        part = rows[
            (rows["model"] == line["model"]) & (rows["route"] == line["route"]) & (rows["window"] == line["window"])
        ]
        part = part if line["kind"] == "all" else part[part["kind"] == line["kind"]]
        column = part["change"] if line["unit"] == "%" and "probability" in line["quantity"] else 100 * part["flipped"]
        assert line["value"] == pytest.approx(column.astype(float).mean())
        assert line["n"] == len(part)
    # what the question's positions hold is read by nobody after the last layer's attention
    idle = found[(found["route"] == "image to question") & (found["window"] == "3")]
    assert len(idle) == 4
    assert (idle["value"] == 0).all()
    # no text may look at the picture: nothing but the prior is left
    cut = found[(found["route"] == "image to all text") & (found["window"] == "all") & (found["kind"] == "all")]
    assert (cut[cut["quantity"] == "answers that flip"]["value"] > 20).all()


def test_patching(table, examples):
    rows, found = examples("patching"), table("patching")
    for _, line in found.iterrows():
        part = rows[(rows["model"] == line["model"]) & rows["clean_right"] & rows["corrupt_right"]]
        part = part if line["kind"] == "all" else part[part["kind"] == line["kind"]]
        part = part[(part["direction"] == line["direction"]) & (part["positions"] == line["positions"])]
        part = part[part["layer"] == line["layer"]]
        restored = (part["ld_patched"] - part["ld_corrupt"]).mean() / (part["ld_clean"] - part["ld_corrupt"]).mean()
        expected = restored if line["quantity"] == "share restored" else 1 - restored
        assert line["value"] == pytest.approx(expected, abs=1e-6)
        assert line["n"] == len(part) == line["groups"]
    # the controls: all of the difference enters at the image tokens, none of it elsewhere
    first = found[found["layer"] == 0]
    assert np.allclose(first["value"], first["positions"] == "image", atol=1e-5)
