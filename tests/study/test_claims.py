"""The published claims as files: all there, strict, and about rows that the tables have."""

import math
from pathlib import Path

import pandas as pd
import pytest

import interp_vlm
from interp_vlm.errors import StudyError
from interp_vlm.study.claim import TABLES, fingerprint, load_claims, parse_claim
from interp_vlm.study.experiments import EXPERIMENTS
from interp_vlm.study.runner import run_study
from interp_vlm.study.settings import Settings
from interp_vlm.study.verdict import VERDICTS, judge_claims

FOLDER = Path(interp_vlm.__file__).parent / "study" / "claims"
FAMILIES = {"llava", "paligemma", "qwen2_vl"}

# What the tables promise: their own columns, and the words in them.
KINDS = {"all", "existence", "open", "digit", "count", "colour", "where"}
WORDS = {
    "signals": {
        "kind": {"all", "existence"},
        "measure": {"entropy", "entropy_normalised", "clusters", "max_attention", "confidence"},
        "sinks": {"with", "without", ""},
        "layer": {-1},
        "quantity": {
            "AUROC",
            "point-biserial correlation",
            "change of H_s over the first quarter of layers",
            "change of H_s at the last layer",
        },
    },
    "reliability": {
        "kind": KINDS,
        "signal": {
            "confidence",
            "logit_certainty",
            "agreement",
            "probe",
            "probe_after_answer",
            "probe_l1",
            "probe_mlp",
        },
        "judged": {"", "greedy", "majority"},
        "layer": {-1},
        "coverage": {""},
        "quantity": {
            "AUROC",
            "point-biserial correlation",
            "probe minus confidence",
            "precision where all samples agree",
        },
    },
    "heads": {
        "kind": KINDS,
        "what": {"top heads", "gradient boosting", "random forest", "MLP on all attention maps"},
        "quantity": {"largest R2 of attention with correctness", "balanced accuracy", "AUROC"},
    },
    "margin": {
        "kind": {"all"},
        "part": {"total", "mlp", "attention", "update"},
        "quantity": {
            "peak truth margin",
            "relative depth of the peak",
            "share of the margin",
            "last layers against the middle",
            "flatness of the middle",
        },
    },
    "masking": {
        "kind": {"all"},
        "mask": {"top", "top without sinks", "random", "bottom", "all"},
        "fill": {"mean", "zero", "own mean"},
        "source": {"all layers", "last layer"},
        "draw": {""},
        "quantity": {"change of accuracy", "change beyond random"},
    },
    "neurons": {
        "kind": {"all"},
        "set": {"top", "random", "random of equal norm", "single"},
        "size": {"1", "5", "10", "25 %", "50 %", "90 %"},
        "fill": {"zero", "mean", "resample", "clamp"},
        "at": {"peak", "each", "depth", "peak, all positions"},
        "draw": {""},
        "quantity": {"change of accuracy", "change beyond random", "change beyond random of equal norm"},
    },
    "bypass": {
        "kind": {"all"},
        "part": {"mlp", "attention"},
        "at": {"matched", "each"},
        "quantity": {"change of accuracy"},
    },
}

CLAIM = """
id = "B1"
statement = "Masking costs accuracy."
question = "How much?"
source = "here"
data = "digit scenes"
models = "any"
parameters = "30 %"
table = "masking"

[chosen]
mask = "top"

[[parts]]
pick = { quantity = "change of accuracy", mask = "top", kind = "all", draw = "", fill = "mean", source = "all layers" }
region = [-inf, -2]
unit = "points"
reason = "two points are a cost"

[[alternatives]]
parameter = "mask"
setting = "bottom"
pick = { mask = "bottom" }
"""


def test_all_22_are_there_in_order():
    claims = load_claims("all")
    assert [claim.id for claim in claims] == [f"A{number}" for number in range(1, 23)]
    assert sorted(file.name for file in FOLDER.iterdir()) == sorted(f"{claim.id}.toml" for claim in claims)


def test_experiments_point_at_the_files_of_the_package():
    link = Path(__file__).parent.parent.parent / "experiments" / "claims"
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == FOLDER.resolve()


@pytest.mark.parametrize("claim", load_claims("all"), ids=lambda claim: claim.id)
def test_each_names_rows_that_the_tables_promise(claim):
    for parameter, setting, parts in claim.variants():
        assert parameter == "" or (parameter in claim.chosen and setting != claim.chosen[parameter])
        for part in parts:
            words = WORDS[part.table]
            for column, wanted in part.pick.items():
                assert {wanted} if not isinstance(wanted, list) else set(wanted) <= words[column], (column, wanted)
            assert {"kind", "quantity"} <= set(part.pick)


@pytest.mark.parametrize("claim", load_claims("all"), ids=lambda claim: claim.id)
def test_each_says_what_was_published_and_why_its_region(claim):
    assert claim.statement.endswith(".")
    assert claim.question.endswith("?")
    published = set()
    for part in claim.parts:
        assert part.reason.endswith(".")
        published |= set(part.published)
        assert set(part.families) <= FAMILIES
        assert not part.families or set(part.published) == set(part.families)
    assert published
    assert published <= FAMILIES | {"pooled"}


def _published(text):
    """The first number of a published figure, "−" or none."""
    digits = text.split(" ")[0].rstrip(",")
    return float(digits)


def test_published_figures_lie_inside_the_regions():
    """A region that the published figure itself misses would not be the claim's."""
    numeric = 0
    for claim in load_claims("all"):
        for part in claim.parts:
            for figure in part.published.values():
                if part.unit in ("%", "points", "logits", "nats") or figure.lstrip("-+")[0] == ".":
                    if "against" in figure or "right" in figure or "less" in figure:
                        continue
                    value = _published(figure)
                    assert part.region[0] <= value <= part.region[1], (claim.id, figure)
                    numeric += 1
    assert numeric > 40


def test_claims_are_found_by_name_in_any_order_and_as_files(tmp_path):
    own = tmp_path / "mine.toml"
    own.write_text(CLAIM)
    claims = load_claims(f"A9, A1,{own}")
    assert [claim.id for claim in claims] == ["A9", "A1", "B1"]
    assert load_claims(["A9", "A1", str(own)]) == claims
    assert load_claims("none") == ()
    assert claims[2].tables == {"masking"}
    assert [(p, s) for p, s, _ in claims[2].variants()] == [("", ""), ("mask", "bottom")]
    assert [part.pick["mask"] for _, _, parts in claims[2].variants() for part in parts] == ["top", "bottom"]


def test_a_changed_claim_has_another_fingerprint():
    first, second = parse_claim(CLAIM, "x"), parse_claim(CLAIM.replace("[-inf, -2]", "[-inf, -3]"), "x")
    assert fingerprint([first]) == fingerprint([parse_claim(CLAIM, "y")])
    assert fingerprint([first]) != fingerprint([second])


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('id = "B1"', "", "lacks 'id'"),
        ('id = "B1"', "id = 3", "id is 3"),
        ('id = "B1"', 'id = ""', "id is empty"),
        ('id = "B1"', 'id = "B1"\ncolour = "red"', "unknown key 'colour'"),
        ('table = "masking"', 'table = "maskings"', "no table 'maskings'"),
        ("region = [-inf, -2]", "region = [-2, -inf]", r"parts\[1\]: region is \[-2, -inf\]"),
        ("region = [-inf, -2]", "region = [-2]", r"parts\[1\]: region is \[-2\]"),
        ("region = [-inf, -2]", "region = [-inf, inf]", "one of them finite"),
        ("region = [-inf, -2]", "region = [nan, 1]", r"parts\[1\]: region"),
        ("region = [-inf, -2]", "region = [true, 3]", r"parts\[1\]: region"),
        ("region = [-inf, -2]", "", r"parts\[1\] lacks 'region'"),
        ('reason = "two points are a cost"', "", r"parts\[1\] lacks 'reason'"),
        ('unit = "points"', 'unit = "points"\nlayers = 3', r"parts\[1\]: unknown key 'layers'"),
        ('unit = "points"', 'unit = "points"\ndepth = [1, 0]', r"parts\[1\]: depth"),
        ('unit = "points"', 'unit = "points"\nfamilies = [3]', r"parts\[1\]: families"),
        ('unit = "points"', 'unit = "points"\npublished = { llava = 3 }', r"parts\[1\]: published.llava is 3"),
        ('mask = "bottom" }', "mask = [] }", r"alternatives\[1\]: pick.mask is \[\]"),
        ('parameter = "mask"', 'parameter = "fill"', r"alternatives\[1\]: parameter 'fill' is not among those chosen"),
        ('setting = "bottom"', 'setting = "bottom"\nparts = ["x"]', r"alternatives\[1\]: there is no part 'x'"),
        ('table = "masking"', 'table = "masking"\nfusion = "middle"', "fusion is 'middle'"),
        ('id = "B1"', "id = ", "is no TOML"),
        ('[chosen]\nmask = "top"', "chosen = 3", "chosen is 3"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, old, new, named):
    assert old in CLAIM
    file = tmp_path / "mine.toml"
    file.write_text(CLAIM.replace(old, new))
    with pytest.raises(StudyError, match=named) as error:
        load_claims(str(file))
    assert str(error.value).startswith("mine.toml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ("A23", "no claim 'A23'"),
        ("A1,A1", "'A1' is named twice"),
        ("", "no claim ''"),
        ("all,A1", "no claim 'all'"),
        ("../A1", "no claim"),
        ("missing.toml", "missing.toml cannot be read"),
    ],
)
def test_unknown_names_are_refused(names, named):
    with pytest.raises(StudyError, match=named):
        load_claims(names)


def test_two_parts_of_one_name_are_refused():
    part = CLAIM[CLAIM.index("[[parts]]") : CLAIM.index("[[alternatives]]")]
    with pytest.raises(StudyError, match="with different names"):
        parse_claim(CLAIM.replace("[[alternatives]]", f"{part}[[alternatives]]"), "mine.toml")
    with pytest.raises(StudyError, match="lacks 'parts'"):
        parse_claim(CLAIM[: CLAIM.index("[chosen]")], "mine.toml")


def test_every_experiment_may_be_spoken_of():
    assert set(EXPERIMENTS) <= set(TABLES)


def test_claims_decide_which_experiments_run():
    everything = tuple(EXPERIMENTS)
    assert Settings().experiments == Settings(claims=("none",)).experiments == everything
    assert Settings(claims=("A6",)).experiments == ("accuracy", "masking")
    assert Settings(claims=("A6", "A1")).experiments == ("accuracy", "signals", "masking")
    with pytest.raises(StudyError, match="no claim 'A0'"):
        Settings(claims=("A0",)).experiments  # noqa: B018


def test_rows_of_a_real_study_are_found(study, table):
    """No claim misses its row for a column or a word that the tables do not have."""
    found = table("claims")
    here = {claim.id for claim in load_claims("all") if claim.tables <= set(EXPERIMENTS)}
    assert {"A1", "A2", "A6"} <= here
    for _, row in found[found["id"].isin(here)].iterrows():
        assert row["verdict"] in VERDICTS
        assert "has no column" not in row["reason"], row["reason"]
        assert "rows of the table" not in row["reason"], row["reason"]
        assert "the row is in" not in row["reason"], row["reason"]
        if "has no row with" in row["reason"]:
            assert "sinks 'without'" in row["reason"] or "kind" in row["reason"], row["reason"]
    assert (study / "tables" / "claims.csv").is_file()


def test_verdicts_of_a_real_study_repeat_from_its_tables(table):
    tables = {name: table(name) for name in EXPERIMENTS}
    known = {
        "llava": {"family": "llava", "fusion": "late", "layers": 4},
        "paligemma": {"family": "paligemma", "fusion": "early", "layers": 4},
    }
    again = judge_claims(load_claims("all"), tables, known)
    pd.testing.assert_frame_equal(again, table("claims"), check_dtype=False)


def test_a_claim_of_ones_own_runs_what_it_needs(tmp_path, quiet):
    own = tmp_path / "mine.toml"
    own.write_text(CLAIM)
    settings = Settings(models=("testbed:llava",), limit=12, draws=2, claims=(str(own),))
    folder = run_study(settings, tmp_path / "run", workers=1, console=quiet).parent
    assert {path.name for path in (folder / "parts").iterdir()} == {"accuracy", "masking"}
    found = pd.read_csv(folder / "tables" / "claims.csv", keep_default_na=False)
    masking = pd.read_parquet(folder / "tables" / "masking.parquet")
    assert list(zip(found["id"], found["setting"], strict=True)) == [("B1", ""), ("B1", "bottom")]
    for mask, value in zip(("top", "bottom"), found["value"], strict=True):
        rows = masking[(masking["mask"] == mask) & (masking["kind"] == "all") & (masking["draw"] == "")]
        rows = rows[(rows["quantity"] == "change of accuracy") & (rows["fill"] == "mean")]
        assert math.isclose(float(value), rows[rows["source"] == "all layers"]["value"].item())
    own.write_text(CLAIM.replace("[-inf, -2]", "[-inf, -3]"))
    with pytest.raises(StudyError, match="claims was"):
        run_study(settings, tmp_path / "run", workers=1, console=quiet, resume=True)


def test_without_claims_nothing_is_judged(tmp_path, quiet, random_model):
    settings = Settings(models=(random_model,), limit=2, draws=1, claims=("none",))
    folder = run_study(settings, tmp_path / "run", workers=1, console=quiet).parent
    assert not list((folder / "tables").glob("claims.*"))
