"""The strongest attempt for attention: rows against the raw model, statistics against slow ones, and both controls."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

import interp_vlm as iv
from interp_vlm.models.loading import load
from interp_vlm.probes.folds import assign
from interp_vlm.probes.measures import fold_auroc
from interp_vlm.stats.inputs import as_groups
from interp_vlm.study.attention_classifiers import CLASSIFIERS, maps, out_of_fold
from interp_vlm.study.experiment import Bench
from interp_vlm.study.heads import HEADS
from interp_vlm.study.material import Shard
from interp_vlm.study.sections.heads import section
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import COLUMNS, where
from interp_vlm.study.top_heads import top_heads
from interp_vlm.testbed.build import question_inputs

SETTINGS = Settings(models=("testbed:llava",), batch_size=8)
LARGEST, SINGLE = "largest R2 of attention with correctness", "R2 of attention with correctness"
LAYERS, HEADS_EACH, SIDE = 2, 3, 4


@pytest.fixture(scope="module")
def measured():
    """The rows of twelve questions and the questions."""
    vlm, examples = iv.load("testbed:llava"), iv.data.digit_scenes("test", 12, 0, "hard")
    return HEADS.measure(Bench(vlm, SETTINGS), Shard(0, "hard", tuple(examples))), examples


def correlation(x, y) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def planted(pictures=60, questions=4, seed=0, informative=False, kinds=("existence", "count")) -> pd.DataFrame:
    """Rows without a model: random attention; `informative`: one head looks where the answer is right, but 1 in 50."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(pictures * questions):
        correct = bool(rng.random() < 0.7)
        cells = rng.dirichlet(np.ones(SIDE * SIDE), (LAYERS, HEADS_EACH)) * rng.uniform(
            0.2, 0.8, (LAYERS, HEADS_EACH, 1)
        )
        parts = rng.normal(0, 0.1, (LAYERS, HEADS_EACH))
        if informative:
            cells[1, 2] *= (0.9 if correct != (rng.random() < 0.02) else 0.1) / cells[1, 2].sum()
            parts[1, 2] = 3.0
        rows.append(
            {
                "condition": "hard", "example": f"e{number}", "group": f"g{number // questions}",
                "kind": kinds[number % len(kinds)], "category": "", "question": "?", "expected": "yes",
                "answer": "yes", "correct": correct, "confidence": rng.random(),
                "mean image_mass": cells.sum(axis=2).mean(), "last image_mass": cells[-1].sum(axis=1).mean(),
                "last head_largest_mass": cells[-1].sum(axis=1).max(), "change entropy": rng.normal(),
                "layers": LAYERS, "heads": HEADS_EACH, "map_rows": SIDE, "map_cols": SIDE,
                "mass": cells.sum(axis=2).ravel().astype(np.float32),
                "contribution": parts.ravel().astype(np.float32),
                "map": cells.ravel().astype(np.float32),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def random_rows():
    return planted()


@pytest.fixture(scope="module")
def random_table(random_rows):
    return HEADS.summarise(random_rows, SETTINGS)


def test_rows_are_the_raw_models_own_attention(measured):
    rows, examples = measured
    model, processor = load("testbed:llava", attn_implementation="eager")
    for number in (0, 5, 11):
        example, row = examples[number], rows.iloc[number]
        inputs = question_inputs(processor, example.image, example.question)
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
        with torch.no_grad():
            out = model(**inputs, output_attentions=True)
        attention = torch.stack([layer[0, :, -1, places] for layer in out.attentions])
        assert row["example"] == example.id
        assert row["correct"] == (processor.tokenizer.decode(out.logits[0, -1].argmax()).strip() == example.answer)
        assert row["confidence"] == pytest.approx(float(out.logits[0, -1].softmax(-1).max()), abs=1e-4)
        assert (row["layers"], row["heads"], row["map_rows"], row["map_cols"]) == (4, 4, 7, 7)
        np.testing.assert_allclose(row["map"], attention.flatten().numpy(), atol=1e-5)
        np.testing.assert_allclose(row["mass"], attention.sum(-1).flatten().numpy(), atol=1e-5)
        assert row["last image_mass"] == pytest.approx(float(attention[-1].sum(-1).mean()), abs=1e-5)
    vlm = iv.load("testbed:llava")
    whole = iv.truth_margin(vlm, vlm.encode([e.image for e in examples], [e.question for e in examples]))
    summed = np.stack(rows["contribution"].to_list()).reshape(12, 4, 4).sum(axis=2)
    np.testing.assert_allclose(summed, whole.attention[..., 0].numpy(), atol=1e-3)


def test_rows_survive_the_disk_and_are_the_same_again(measured, tmp_path):
    rows, examples = measured
    again = HEADS.measure(Bench(iv.load("testbed:llava"), SETTINGS), Shard(0, "hard", tuple(examples)))
    for frame, name in ((rows, "one"), (again, "two")):
        frame.to_parquet(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_table_keeps_its_contract(random_table):
    assert tuple(random_table.columns) == ("condition", "kind", "what", "layer", "head", *COLUMNS)
    assert random_table["head"].dtype == "Int64"
    assert set(random_table["kind"]) == {"all", "existence", "count", "open"}
    needed = [("top heads", LARGEST)] + [(what, "AUROC") for what in (*CLASSIFIERS, "confidence")]
    needed += [(what, "balanced accuracy") for what in CLASSIFIERS[:2]]
    for what, quantity in needed:
        for kind in ("all", "existence", "open"):
            line = where(random_table, what=what, quantity=quantity, kind=kind, layer=-1, head=-1)
            assert len(line) == 1
            assert not line[["value", "low", "high", "level", "n", "groups", "baseline", "seed"]].isna().any(axis=None)
            assert line["compared"].item()
            assert line["low"].item() <= line["value"].item() <= line["high"].item()
    assert not random_table.loc[random_table["quantity"] == LARGEST, "p"].isna().any()
    assert len(where(random_table, what="all heads", quantity=SINGLE, kind="all")) == LAYERS * HEADS_EACH
    assert "6 of 6 heads" in where(random_table, what="top heads", quantity=LARGEST, kind="all")["note"].item()


def test_single_heads_against_numpy(random_rows, random_table):
    masses, parts = np.stack(random_rows["mass"].to_list()), np.stack(random_rows["contribution"].to_list())
    for kind in ("all", "count"):
        inside = (random_rows["kind"] == kind).to_numpy() if kind != "all" else np.ones(len(random_rows), dtype=bool)
        for _, line in where(random_table, what="all heads", kind=kind).iterrows():
            place = line["layer"] * HEADS_EACH + line["head"]
            if line["quantity"] == SINGLE:
                r = correlation(masses[inside, place], random_rows["correct"][inside])
                assert line["value"] == pytest.approx(r**2)
                assert 0 <= line["low"] <= line["value"] <= line["high"]
            else:
                sizes = parts[:, place] if line["quantity"] == "contribution" else np.abs(parts[:, place])
                assert line["value"] == pytest.approx(sizes.mean(), abs=1e-6)


def test_the_largest_r2_step_by_step():
    """The choice and the reading once more, with loops."""
    rows = planted(seed=3)
    mass, parts = np.stack(rows["mass"].to_list()).astype(float), np.stack(rows["contribution"].to_list()).astype(float)
    mass, parts = np.hstack([mass, mass[::-1]]), np.hstack([parts, 2 * parts])  # twelve heads: five are looked at
    right = rows["correct"].to_numpy()
    mass[:, 8] += 0.3 * right
    codes, _ = as_groups(rows["group"], len(rows))
    half = assign(right, codes, 2, 7)
    held = []
    for here, there in ((0, 1), (1, 0)):
        strong = sorted(range(12), key=lambda i: -np.abs(parts[half == here, i]).mean())[:5]
        r = {i: correlation(mass[half == here, i], right[half == here]) for i in strong}
        best = max(strong, key=lambda i: abs(r[i]))
        held.append(np.sign(r[best]) * correlation(mass[half == there, best], right[half == there]))
    found = top_heads(mass, parts, right, rows["group"], HEADS_EACH, 7)
    assert found.value == pytest.approx(max(0.0, float(np.mean(held))) ** 2)
    assert found.reason.startswith("5 of 12 heads")
    assert found.p == 0.001
    assert "layer 2 head 2" in found.reason


def test_a_planted_head_is_found():
    table = HEADS.summarise(planted(pictures=40, informative=True, kinds=("count",)), SETTINGS)
    top = where(table, what="top heads", quantity=LARGEST).iloc[0]
    assert top["value"] > 0.75
    assert top["low"] > 0.6
    assert top["p"] == 0.001
    assert "chosen: layer 1 head 2" in top["note"]
    for what in CLASSIFIERS:
        assert where(table, what=what, quantity="AUROC")["value"].item() > 0.9
    assert where(table, what="gradient boosting", quantity="balanced accuracy")["value"].item() > 90
    assert (where(table, quantity="AUROC minus confidence's")["low"] > 0).all()


def test_random_attention_tells_nothing(random_table):
    whole = where(random_table, kind="all")
    for what in CLASSIFIERS:
        line = where(whole, what=what, quantity="AUROC").iloc[0]
        assert line["low"] < 0.5 < line["high"]
    balanced = where(whole, quantity="balanced accuracy")
    assert ((balanced["low"] < 50) & (balanced["high"] > 50)).all()
    assert where(whole, quantity=LARGEST)["p"].item() > 0.05


def test_the_test_of_the_largest_r2_holds_its_level():
    """With nothing to find, p falls below 0.2 about one time in five, and hardly more often."""
    low = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mass, parts, right = rng.normal(size=(160, 12)), rng.normal(size=(160, 12)), rng.random(160) < 0.7
        found = top_heads(mass, parts, right, np.repeat(np.arange(40), 4), 4, seed)
        low += found.p is not None and found.p <= 0.2
    assert 0 < low <= 9  # binomial(20, 0.2): more than 9 once in 400 tries, none once in 90


def test_classifiers_are_judged_on_other_pictures_within_folds(random_rows, random_table):
    found = out_of_fold(random_rows, SETTINGS.seed)
    labels = random_rows["correct"].to_numpy(dtype=bool)
    for what, scored in found.items():
        picture_folds = pd.DataFrame({"group": random_rows["group"], "fold": scored.folds}).groupby("group")["fold"]
        assert (picture_folds.nunique() == 1).all()
        for kind in ("all", "open"):
            inside = (
                np.ones(len(labels), dtype=bool) if kind == "all" else (random_rows["kind"] != "existence").to_numpy()
            )
            line = where(random_table, what=what, quantity="AUROC", kind=kind).iloc[0]
            expected = fold_auroc(scored.scores[inside, None], labels[inside], scored.folds[inside])[0]
            assert line["value"] == pytest.approx(expected)
            assert "5 folds by picture" in line["method"]
            if scored.cut:
                line = where(random_table, what=what, quantity="balanced accuracy", kind=kind).iloc[0]
                expected = balanced_accuracy_score(labels[inside], scored.scores[inside] > 0)
                assert line["value"] == pytest.approx(100 * expected)


def test_pictures_of_differing_grids_share_one():
    rows = planted(pictures=5)
    assert maps(rows).shape == (20, LAYERS * HEADS_EACH * SIDE * SIDE)
    small = np.arange(LAYERS * HEADS_EACH * 6, dtype=np.float32)
    rows["map"] = pd.Series([small if number == 3 else flat for number, flat in enumerate(rows["map"])])
    rows.loc[3, ["map_rows", "map_cols"]] = 2, 3
    pooled = maps(rows)
    assert pooled.shape == (20, LAYERS * HEADS_EACH * 64)
    squares = (pooled**2).reshape(20, LAYERS * HEADS_EACH, 64).sum(axis=2)
    assert squares[0] == pytest.approx(rows["mass"][0], rel=1e-5)
    assert squares[3] == pytest.approx(np.arange(36).reshape(6, 6).sum(axis=1), rel=1e-5)


def test_one_class_and_few_pictures_are_a_result():
    right = planted(pictures=12).assign(correct=True)
    few = planted(pictures=3)
    for rows, reason in ((right, "wrong answers about 0 pictures"), (few, "answers about 3 pictures")):
        table = HEADS.summarise(rows, SETTINGS)
        lines = table[table["what"].isin((*CLASSIFIERS, "top heads"))]
        lines = lines[lines["quantity"].isin([LARGEST, "AUROC", "balanced accuracy"])]
        assert lines["value"].isna().any()
        assert (lines.loc[lines["value"].isna(), "note"] != "").all()
        assert lines["note"].str.contains(reason).any()
    told = section(HEADS.summarise(right, SETTINGS).assign(model="one"), ["one"])
    assert told.answer.startswith("This cannot be said")


def test_the_section_says_what_the_table_says(random_table):
    informative = HEADS.summarise(planted(pictures=40, informative=True), SETTINGS)
    both = pd.concat([random_table.assign(model="dull"), informative.assign(model="bright")])
    told = section(both, ["dull", "bright"])
    assert told.title == "Could any use of attention do better?"
    assert "of 6 classifiers do better than chance" in told.answer
    assert told.answer.endswith("evidence for bright.")
    assert [point.split(":")[0] for point in told.points] == ["dull", "bright"]
    heads, lines = told.table
    assert heads == ("questions", "from", "quantity", "dull", "bright")
    assert len(lines) == 4 * 10
    assert [panel.name for panel in told.panels] == ["heads-auroc", "heads-r2"]
    image = np.asarray(told.panels[1].figure.axes[1].images[0].get_array())
    assert image.shape == (LAYERS, HEADS_EACH)
    assert image[1, 2] > 0.75
    assert np.isfinite(image).all()
