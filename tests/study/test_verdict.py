"""Verdicts by closed form, and in every case that a table can present."""

import math
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, norm

from interp_vlm.stats import equivalence
from interp_vlm.study.claim import Alternative, Claim, Part
from interp_vlm.study.sections.claims import section
from interp_vlm.study.verdict import COLUMNS, decide, judge_claims, needed_factor, region_text

INF, NAN = math.inf, math.nan
Z, Z80 = norm.ppf(0.975), norm.ppf(0.8)
FACTS = {
    "one": {"family": "llava", "fusion": "late", "layers": 4},
    "two": {"family": "paligemma", "fusion": "early", "layers": 4},
}
PART = Part(
    "masking", {"quantity": "change", "kind": "all"}, (-INF, -2.0), "points", "why", published={"llava": "-8.2"}
)


def _claim(*parts, **facts):
    words = dict.fromkeys(("question", "source", "data", "models", "parameters"), "x")
    return Claim(**{"id": "B1", "statement": "It is so.", "parts": parts or (PART,), "chosen": {}, **words, **facts})


def _line(value=-10.0, low=-12.0, high=-8.0, **facts):
    own = {"model": "one", "quantity": "change", "kind": "all", "layer": -1, "unit": "points", "level": 0.95}
    return {
        **own,
        "value": value,
        "low": low,
        "high": high,
        "n": 300,
        "groups": 50,
        "baseline": 0.0,
        "note": "",
        **facts,
    }


def _judged(claim, *lines, facts=FACTS, **tables):
    frame = judge_claims([claim], {"masking": pd.DataFrame(lines), **tables}, facts)
    assert tuple(frame.columns) == COLUMNS
    return frame[frame["model"] == "one"].iloc[0]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.2, -0.11, "contradicted"),
        (-0.2, -0.1, "underpowered"),
        (-0.2, 0.0, "underpowered"),
        (-0.1, 0.1, "supported"),
        (-0.05, 0.05, "supported"),
        (0.05, 0.15, "underpowered"),
        (-0.5, 0.5, "underpowered"),
        (0.11, 0.2, "contradicted"),
        (NAN, NAN, "not applicable"),
    ],
)
def test_the_rule(low, high, verdict):
    assert decide(low, high, (-0.1, 0.1)) == verdict
    assert decide(-high, -low, (-0.1, 0.1)) == verdict


def test_inside_a_region_around_0_is_the_equivalence_test():
    changes = [0.0] * 180 + [1.0] * 9 + [-1.0] * 11
    for margin in (0.01, 0.03, 0.05, 0.06, 0.1):
        tost = equivalence(changes, margin, alpha=0.025)  # its interval is the 95 % one
        assert math.isclose(tost.level, 0.95)
        assert (decide(tost.low, tost.high, (-margin, margin)) == "supported") == (tost.p < 0.025)


@given(st.floats(-3, 3), st.floats(0.05, 2), st.floats(-2, 2))
def test_n_needed_with_one_edge_is_the_closed_form(value, error, edge):
    distance = abs(value - edge)
    if distance < 0.01:
        return
    expected = ((Z + Z80) * error / distance) ** 2
    for region in ((edge, INF), (-INF, edge)):
        factor = needed_factor(value, value - Z * error, value + Z * error, region)
        assert math.isclose(factor, expected, rel_tol=1e-6)


@given(st.floats(-0.95, 0.95), st.floats(0.1, 2))
def test_n_needed_between_two_edges_has_the_power_it_states(value, error):
    factor = needed_factor(value, value - Z * error, value + Z * error, (-1.0, 1.0))

    def power(times):
        own = error / math.sqrt(times)
        return norm.cdf((1 - value) / own - Z) - norm.cdf((-1 - value) / own + Z)

    assert math.isclose(power(factor), 0.8, abs_tol=1e-6)
    assert math.isclose(factor, brentq(lambda times: power(times) - 0.8, 1e-6, 1e8, rtol=1e-12), rel_tol=1e-4)


def test_n_needed_takes_the_half_of_the_interval_towards_the_edge():
    assert math.isclose(needed_factor(0.7, 0.5, 0.75, (0.6, INF)), ((Z + Z80) / Z * 0.2 / 0.1) ** 2, rel_tol=1e-6)
    assert math.isclose(needed_factor(0.5, 0.45, 0.7, (0.6, INF)), ((Z + Z80) / Z * 0.2 / 0.1) ** 2, rel_tol=1e-6)
    assert needed_factor(0.6, 0.5, 0.7, (0.6, INF)) == INF


def test_underpowered_always_needs_more():
    for value in (-0.3, -0.11, -0.099, 0.0, 0.05, 0.4):
        for half in (0.02, 0.1, 0.5, 2.0):
            interval = (value - half, value + half)
            if decide(*interval, (-0.1, 0.1)) == "underpowered":
                assert needed_factor(value, *interval, (-0.1, 0.1)) > 1


def test_regions_in_words():
    assert region_text((-INF, -2.0), "points") == "at most -2 points"
    assert region_text((0.6, INF), "") == "at least 0.6"
    assert region_text((-0.1, 0.1), "") == "-0.1 to 0.1"


def test_four_verdicts_from_a_row():
    found = _judged(_claim(), _line())
    assert (found["verdict"], found["value"], found["n"], found["groups"]) == ("supported", -10.0, 300, 50)
    assert (found["published"], found["region"], found["rule"]) == ("-8.2", "at most -2 points", "why")
    assert pd.isna(found["n_needed"])
    assert _judged(_claim(), _line(0.0, -1.0, 1.0))["verdict"] == "contradicted"
    found = _judged(_claim(), _line(-3.0, -5.0, -1.0))
    assert found["verdict"] == "underpowered"
    times = ((Z + Z80) / Z * 2.0) ** 2
    assert (found["n_needed"], found["groups_needed"]) == (math.ceil(300 * times), math.ceil(50 * times))
    found = _judged(_claim(), _line(NAN, NAN, NAN, note="one class: every label is True"))
    assert (found["verdict"], found["reason"]) == ("not applicable", "one class: every label is True")


def test_on_the_edge_no_n_is_enough():
    found = _judged(_claim(), _line(-2.0, -5.0, 1.0))
    assert found["verdict"] == "underpowered"
    assert pd.isna(found["n_needed"])
    assert "on the edge" in found["reason"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"quantity": "other"}, "the table masking has no row with quantity 'change'"),
        ({"model": "two"}, "no row with quantity"),
        ({"unit": "%"}, "the row is in %, the claim in points"),
        ({"level": 0.90}, "the row's interval is at 90 %"),
        ({"low": NAN, "high": NAN, "note": "undefined in 300 of 2000 resamples"}, "undefined in 300 of 2000 resamples"),
    ],
)
def test_why_a_row_does_not_do(line, reason):
    found = _judged(_claim(), _line(**line))
    assert found["verdict"] == "not applicable"
    assert reason in found["reason"]


def test_a_row_has_to_be_the_only_one():
    found = _judged(_claim(), _line(), _line(layer=2, value=-9.0))
    assert found["verdict"] == "not applicable"
    assert found["reason"] == "2 rows of the table masking fit, which differ in layer, value"


def test_what_the_tables_lack_is_said():
    assert _judged(_claim(replace(PART, table="heads")), _line())["reason"] == "the experiment heads was not done"
    other = _claim(replace(PART, pick={**PART.pick, "fill": "zero"}))
    assert _judged(other, _line())["reason"] == "the table masking has no column 'fill'"


def test_other_families_keep_their_numbers_without_a_verdict():
    for claim in (_claim(families=("paligemma",)), _claim(fusion="early")):
        found = _judged(claim, _line())
        assert found["verdict"] == "not applicable"
        assert found["reason"].startswith("the claim speaks of")
        assert (found["value"], found["low"]) == (-10.0, -12.0)
    assert _judged(_claim(families=("llava",)), _line())["verdict"] == "supported"
    assert _judged(_claim(fusion="late"), _line())["verdict"] == "supported"


def test_parts_of_other_families_do_not_count():
    claim = _claim(
        replace(PART, name="down", families=("llava",)),
        replace(PART, name="up", families=("paligemma",), region=(2.0, INF)),
    )
    frame = judge_claims([claim], {"masking": pd.DataFrame([_line(), _line(model="two")])}, FACTS)
    assert list(frame["verdict"]) == ["supported", "contradicted"]
    assert list(frame["part"]) == ["down", "up"]
    unknown = {"one": {"family": "gemma3", "fusion": "early", "layers": 4}}
    found = _judged(claim, _line(), facts=unknown)
    assert (found["verdict"], found["reason"]) == (
        "not applicable",
        "the claim speaks of llava and paligemma alone",
    )


@pytest.mark.parametrize(
    ("second", "verdict", "decides"),
    [
        ((-10.0, -12.0, -8.0), "supported", "b"),
        ((-3.0, -5.0, -1.0), "underpowered", "b"),
        ((0.0, -1.0, 1.0), "contradicted", "b"),
        ((NAN, NAN, NAN), "not applicable", "b"),
    ],
)
def test_all_parts_must_hold(second, verdict, decides):
    parts = (replace(PART, name="a"), replace(PART, name="b", pick={**PART.pick, "kind": "digit"}))
    found = _judged(_claim(*parts), _line(-20.0, -21.0, -19.0), _line(*second, kind="digit", note="none"))
    assert (found["verdict"], found["part"]) == (verdict, decides)
    assert found["parts"].startswith("a: -20 [-21, -19], true where at most -2 points: supported; b:")
    assert found["parts"].endswith(verdict)
    shown = section(pd.DataFrame([found]), ["one"]).lines[0].cells[0]
    assert len(shown.parts) == 2
    assert shown.parts[0] == "a: −20 [−21, −19], true where at most −2 points: supported"


def test_one_part_that_fails_outweighs_one_that_is_absent():
    parts = (replace(PART, name="a", table="heads"), replace(PART, name="b"))
    assert _judged(_claim(*parts), _line(0.0, -1.0, 1.0))["verdict"] == "contradicted"
    assert _judged(_claim(*parts), _line())["verdict"] == "not applicable"


def test_each_row_must_hold_and_the_worst_is_shown():
    claim = _claim(replace(PART, each="layer", region=(-5.0, 5.0)))
    lines = [_line(float(layer), layer - 1.0, layer + 1.0, layer=layer) for layer in range(4)]
    found = _judged(claim, *lines)
    assert (found["verdict"], found["value"]) == ("supported", 3.0)
    assert "layer 3" in found["row"]
    found = _judged(claim, *lines, _line(8.0, 7.0, 9.0, layer=4))
    assert (found["verdict"], found["value"]) == ("contradicted", 8.0)


def test_depth_leaves_early_layers_out():
    lines = [
        _line(-9.0 if layer == 0 else 0.0, *((-10, -8) if layer == 0 else (-1, 1)), layer=layer) for layer in range(4)
    ]
    part = replace(PART, each="layer", region=(-5.0, 5.0))
    assert _judged(_claim(part), *lines)["verdict"] == "contradicted"
    assert _judged(_claim(replace(part, depth=(0.32, 1.0))), *lines)["verdict"] == "supported"
    assert "at the depth asked for" in _judged(_claim(replace(part, depth=(0.4, 0.5))), *lines)["reason"]


def test_another_kind_stands_in_and_is_named():
    claim = _claim(replace(PART, pick={**PART.pick, "kind": ["existence", "all"]}))
    found = _judged(claim, _line(), _line(-20.0, -21.0, -19.0, kind="existence"))
    assert (found["value"], found["reason"]) == (-20.0, "")
    found = _judged(claim, _line())
    assert (found["value"], found["reason"]) == (-10.0, "kind 'all', as there is no 'existence' apart")


def test_questions_about_existence_do_not_stand_in_for_open_ones():
    claim = _claim(replace(PART, pick={**PART.pick, "kind": ["open", "all"]}))
    for kinds, verdict in ((["all", "existence"], "not applicable"), (["all", "vqa"], "supported")):
        accuracy = pd.DataFrame({"model": "one", "kind": kinds})
        assert _judged(claim, _line(), accuracy=accuracy)["verdict"] == verdict


def test_alternatives_stand_beside_the_claim():
    other = Alternative("kind", "digits", {"kind": "digit"})
    stricter = Alternative("margin", "none", {}, region=(-INF, -15.0), reason="because")
    claim = _claim(chosen={"kind": "all", "margin": "2"}, alternatives=(other, stricter))
    tables = {"masking": pd.DataFrame([_line(), _line(-1.0, -1.5, -0.5, kind="digit")])}
    frame = judge_claims([claim], tables, {"one": FACTS["one"]})
    assert list(zip(frame["parameter"], frame["setting"], frame["verdict"], strict=True)) == [
        ("", "", "supported"),
        ("kind", "digits", "contradicted"),
        ("margin", "none", "contradicted"),
    ]
    assert list(frame["rule"]) == ["why", "why", "because"]


def test_an_alternative_may_change_one_part_alone():
    parts = (replace(PART, name="a"), replace(PART, name="b"))
    other = Alternative("kind", "digits", {"kind": "digit"}, parts=("b",))
    changed = list(_claim(*parts, chosen={"kind": "all"}, alternatives=(other,)).variants())[1][2]
    assert [part.pick["kind"] for part in changed] == ["all", "digit"]


@pytest.mark.parametrize(("groups", "margin"), [(50, 5.0), (80, 5.0), (200, 5.0), (50, 10.0)])
def test_where_nothing_changed_the_bound_is_the_binomial_one(groups, margin):
    line = _line(0.0, NAN, NAN, n=6 * groups, groups=groups, note="no variance: every resample gives 0")
    found = _judged(_claim(replace(PART, region=(-margin, margin))), line)
    # the largest share of pictures that could change and yet show none in so many, 2.5 % of the time
    bound = 100 * brentq(lambda share: binom.pmf(0, groups, share) - 0.025, 0, 1)
    assert math.isclose(found["high"], bound, abs_tol=1e-9)
    assert found["low"] == -found["high"]
    assert found["verdict"] == ("supported" if bound <= margin else "underpowered")
    assert "no picture changed" in found["reason"]
    if bound > margin:
        needed = found["groups_needed"]
        assert binom.pmf(0, needed, margin / 100) <= 0.025 < binom.pmf(0, needed - 1, margin / 100)


def test_where_nothing_changed_a_bound_in_the_table_is_taken_as_it_is():
    reach = 100 * (1 - 0.025 ** (1 / 60))
    line = _line(0.0, -reach, reach, n=60, groups=10, method="exact binomial bound, questions as trials")
    found = _judged(_claim(replace(PART, region=(-5.0, 5.0))), line)
    assert (found["verdict"], found["high"]) == ("underpowered", reach)
    assert binom.pmf(0, found["n_needed"], 0.05) <= 0.025 < binom.pmf(0, found["n_needed"] - 1, 0.05)


def test_nothing_changed_tells_against_a_cost_too():
    line = _line(0.0, NAN, NAN, n=1200, groups=200, note="no variance: every resample gives 0")
    assert _judged(_claim(), line)["verdict"] == "contradicted"
    line = _line(0.0, NAN, NAN, n=300, groups=50, note="no variance: every resample gives 0")
    assert _judged(_claim(), line)["verdict"] == "underpowered"


def test_published_figures_of_the_family_else_pooled_else_all():
    for published, shown in (
        ({"llava": "1", "pooled": "2"}, "1"),
        ({"paligemma": "3", "pooled": "2"}, "2 (pooled)"),
        ({"paligemma": "3", "qwen2_vl": "4"}, "3 (paligemma), 4 (qwen2_vl)"),
        ({}, ""),
    ):
        assert _judged(_claim(replace(PART, published=published)), _line())["published"] == shown


def test_tables_read_back_equal(tmp_path):
    frame = judge_claims([_claim()], {"masking": pd.DataFrame([_line(-3.0, -5.0, -1.0)])}, FACTS)
    frame.to_parquet(tmp_path / "claims.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "claims.parquet"), frame)


def test_the_section_is_made_from_the_verdicts():
    names = ("B1", "B2", "B3")
    kinds = ("all", "digit", "count")
    claims = [
        _claim(replace(PART, pick={**PART.pick, "kind": kind}), id=name, note="a note")
        for name, kind in zip(names, kinds, strict=True)
    ]
    other = Alternative("kind", "digits", {"kind": "digit"})
    claims[0] = replace(claims[0], chosen={"kind": "all"}, alternatives=(other,))
    lines = [_line(), _line(0.0, -1.0, 1.0, kind="digit"), _line(-3.0, -5.0, -1.0, kind="count")]
    frame = judge_claims(claims, {"masking": pd.DataFrame(lines)}, FACTS)
    made = section(frame, ["one", "two"])
    assert (
        made.summary == "Of the published claims that can be judged here, these hold: 1 of 3 in one and 0 of 0 in two."
    )
    assert "In one, of 3 claims that can be judged, 1 holds, 1 does not, and 1 cannot be decided" in made.answer
    assert [line.id for line in made.lines] == list(names)
    assert [line.cells[0].verdict for line in made.lines] == ["supported", "contradicted", "underpowered"]
    glued = [line.cells[0].effect.replace("\u00a0", " ") for line in made.lines]
    assert glued[0] == "−10.0 points [−12.0, −8.0], n = 300"
    assert made.lines[2].cells[0].detail.replace("\u00a0", " ").startswith("would need n = ")
    assert made.lines[0].cells[0].published == "published: −8.2"
    assert made.lines[0].note == "a note"
    assert made.lines[0].cells[1].detail == "the table masking has no row with quantity 'change'"
    assert [(line.id, line.lead) for line in made.alternatives] == [
        ("B1", "kind: all (as above)"),
        ("B1", "kind: digits"),
    ]
    assert [line.cells[0].verdict for line in made.alternatives] == ["supported", "contradicted"]
    assert made.table[0] == ("claim", "what is said", "true where", "one", "two")
    assert len(made.table[1]) == 3
