"""What an ablation changed, where numbers can be worked by hand, and where nothing changed."""

from __future__ import annotations

import pandas as pd
import pytest
from scipy.stats import binom

from interp_vlm.study.changes import by_quantity, change_rows
from interp_vlm.study.tables import tidy

GROUPS = pd.Series([f"p{number // 6:02d}" for number in range(300)])


def _table(after: pd.Series, before: pd.Series) -> pd.DataFrame:
    rows = change_rows(after, before, after != before, GROUPS, 0, {"part": "mlp"})
    return by_quantity(tidy(rows, ("part",))).set_index("quantity")


def test_no_answer_changed():
    """300 questions without a change: exact bounds, each question a trial, and no claim of no effect without a test."""
    before = pd.Series([True] * 280 + [False] * 20)
    table = _table(before.copy(), before)
    change, same = table.loc["change of accuracy"], table.loc["equivalence within 5 points"]
    # above the bound, no change in 300 questions would be seen in less than 2.5 % of samples
    assert binom.pmf(0, 300, change["high"] / 100) == pytest.approx(0.025)
    assert change["low"] == -change["high"]
    assert (change["value"], change["p"], change["note"]) == (0.0, 1.0, "no answer's correctness changed")
    assert binom.pmf(0, 300, same["high"] / 100) == pytest.approx(0.05)
    assert same["p"] == pytest.approx(0.95**300)
    least = table.loc["smallest detectable effect", "value"] / 100
    # exact McNemar: 5 changes one way give p = .0625, 6 give .031
    assert binom.sf(5, 300, least) == pytest.approx(0.80)
    assert table.loc["answers that flip", "value"] == 0.0


def test_few_questions_without_a_change_show_little():
    before = pd.Series([True] * 12)
    rows = change_rows(before.copy(), before, before != before, GROUPS[:12], 0, {"part": "mlp"})
    same = tidy(rows, ("part",)).set_index("quantity").loc["equivalence within 5 points"]
    assert same["p"] == pytest.approx(0.95**12)
    assert same["p"] > 0.05
    assert same["high"] > 5


def test_a_change_by_hand():
    """30 of 300 right answers are lost, one in every other picture more or less: −10 points."""
    before = pd.Series([True] * 300)
    after = pd.Series([number % 10 != 3 for number in range(300)])
    table = _table(after, before)
    for quantity in ("change of accuracy", "change of accuracy, exact McNemar", "equivalence within 5 points"):
        assert table.loc[quantity, "value"] == pytest.approx(-10.0)
    assert table.loc["accuracy", "value"] == pytest.approx(90.0)
    assert table.loc["answers that flip", "value"] == pytest.approx(10.0)
    assert table.loc["change of accuracy, exact McNemar", "p"] == pytest.approx(2 * 0.5**30)
    assert "pictures ignored" in table.loc["change of accuracy, exact McNemar", "note"]
    assert table.loc["equivalence within 5 points", "p"] > 0.99
    assert 0 < table.loc["smallest detectable effect", "value"] < 10


def test_holm_is_taken_within_a_quantity():
    frame = pd.DataFrame({"quantity": ["a", "b", "a", "b"], "p": [0.01, 0.02, 0.04, float("nan")], "p_holm": None})
    assert by_quantity(frame.astype({"p_holm": float}))["p_holm"].tolist()[:3] == pytest.approx([0.02, 0.02, 0.04])
