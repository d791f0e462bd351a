"""The report: self-contained, safe, made from the numbers, and there for any data."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from PIL import Image

from interp_vlm.data.digits import digit_scenes
from interp_vlm.study.runner import run_study
from interp_vlm.study.sections import accuracy, knockout, masking, patching, signals
from interp_vlm.study.sections.words import bracket, listed, p_text, span, text
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import where


class _Page(HTMLParser):
    """What a browser would load, and what a reader would see."""

    def __init__(self, html):
        super().__init__()
        self.sources, self.tags, self.seen = [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.seen).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        self.sources += [named[name] for name in ("src", "href", "srcset", "data") if named.get(name)]

    def handle_data(self, data):
        if self.tags[-1:] != ["style"]:
            self.seen.append(data)


@pytest.fixture(scope="module")
def page(study):
    return _Page((study / "report.html").read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_elsewhere(study, page):
    html = (study / "report.html").read_text(encoding="utf-8")
    for source in page.sources:
        assert source.startswith(("data:image/png;base64,", "#"))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert "url(" not in html


def test_its_pictures_are_the_figures(study, page):
    shown = [base64.b64decode(source.partition(",")[2]) for source in page.sources if source.startswith("data:")]
    saved = {path.read_bytes() for path in (study / "figures").glob("*.png")}
    assert set(shown) == saved
    assert len(shown) == len(saved) >= 11
    for content in shown:
        with Image.open(io.BytesIO(content)) as picture:
            assert min(picture.size) > 400


def test_it_says_what_the_tables_say(page, table):
    assert page.text.count("How it was measured") == 10
    for model in ("llava", "paligemma"):
        row = where(table("accuracy"), model=model, condition="standard", kind="all").iloc[0]
        assert f"{text(row['value'])}\u00a0%".replace("\u00a0", " ") in page.text.replace("\u00a0", " ")
        row = where(table("masking"), model=model, kind="all", mask="top", compared="as many random patches")
        assert bracket(row.iloc[0]).replace("\u00a0", " ") in page.text.replace("\u00a0", " ")
    assert "what holds for them need not hold for the published models" in page.text
    assert "interp-vlm study --model testbed:llava --model testbed:paligemma --limit 24" in page.text


def _without_effect(found: pd.DataFrame) -> pd.DataFrame:
    """The same table with intervals that include every null."""
    span = found["value"].abs() + 1
    return found.assign(low=found["baseline"].fillna(0.0) - span, high=found["baseline"].fillna(0.0) + span)


@pytest.mark.parametrize("section", [signals, masking, knockout, patching])
def test_evidence_is_claimed_only_where_the_interval_excludes_the_null(table, section):
    found = table(section.__name__.rpartition(".")[2])
    models = ["llava", "paligemma"]
    assert "no evidence" in section.section(_without_effect(found), models).answer
    value = found["value"].mask(found["quantity"].str.startswith("AUROC"), 0.9)
    sharp = found.assign(value=value, low=value - 1e-6, high=value + 1e-6)
    assert "no evidence" not in section.section(sharp, models).answer


def test_numbers_in_words():
    row = pd.Series({"value": -0.04, "low": -1.26, "high": float("nan")})
    assert text(-0.04) == "0.0"
    assert text(float("nan")) == "–"
    assert span(pd.Series({"value": -2.0, "low": -3.0, "high": -1.0}), 0, "%") == "−2\u00a0% [−3,\u00a0−1]"
    assert bracket(row.replace({-1.26: float("nan")})) == ""
    assert p_text(0.00004) == "p\u00a0<\u00a00.001"
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a and b"


@pytest.fixture(scope="module")
def other(tmp_path_factory, quiet):
    """A study of a file of questions with markup in them, one picture broken."""
    folder = tmp_path_factory.mktemp("file")
    lines = []
    for number, example in enumerate(digit_scenes(n=24, questions_per_image=2)):
        if number % 2 == 0:
            example.image.save(folder / f"{number // 2}.png")
        kind = "<b>bold</b>" if number % 2 else "existence"
        lines.append(
            {"image": f"{number // 2}.png", "question": example.question, "answer": example.answer, "kind": kind}
        )
    (folder / "3.png").write_bytes(b"broken")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = f"file:{folder}/questions.jsonl?images={folder}"
    settings = Settings(models=("testbed:llava",), data=data, draws=2, on_error="skip", batch_size=12)
    return run_study(settings, folder / "run", workers=1, console=quiet).parent


def test_other_data_than_digits(other):
    page = _Page((other / "report.html").read_text(encoding="utf-8"))
    assert "2 could not be read and were left out" in page.text
    assert re.search(r"3\.png \(.+\)", page.text)
    assert "Not done: patching" in page.text
    assert "only digit scenes come in pairs" in page.text
    assert "b" not in page.tags
    assert "<b>bold</b>" in page.text
    assert not (other / "tables" / "patching.csv").exists()
    found = pd.read_csv(other / "tables" / "accuracy.csv")
    assert set(found["condition"]) == {"as given"}
    assert (
        where(found, kind="all")["n"].iloc[0] == 24 - 2 - 2 - 4
    )  # broken; of eleven pictures, one and then two set aside


@pytest.mark.parametrize("limit", [1, 7])
def test_a_handful_of_questions_makes_a_report(random_model, tmp_path, quiet, limit):
    settings = Settings(models=(random_model,), limit=limit, draws=2)
    report = run_study(settings, tmp_path / "run", workers=1, console=quiet)
    page = _Page(report.read_text(encoding="utf-8"))
    assert "How often are the models right?" in page.text
    found = pd.read_parquet(tmp_path / "run" / "tables" / "accuracy.parquet")
    assert where(found, kind="all", condition="standard")["n"].iloc[0] == limit


def test_the_accuracy_section_lists_other_scoring_rules(table):
    found = table("accuracy")
    extra = found[found["kind"] == "all"].assign(quantity="accuracy by the rule pope_official", value=12.3)
    made = accuracy.section(pd.concat([found, extra]), ["llava", "paligemma"])
    assert any("pope_official 12.3" in point for point in made.points)
