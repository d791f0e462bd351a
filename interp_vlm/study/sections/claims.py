"""Verdicts on the published claims, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from interp_vlm.study.sections.section import Section
from interp_vlm.study.sections.words import GLUE, counted, listed, text
from interp_vlm.study.tables import where
from interp_vlm.study.verdict import VERDICTS

__all__ = ["Cell", "ClaimSection", "Line", "section"]

_METHOD = """Each claim is a file that fixes beforehand which number it is about and the region in which it is true.
Supported: the 95 % interval lies inside that region; contradicted: it lies outside; underpowered: it crosses
an edge, with the number of questions that would decide it in four of five studies if the estimate were the
truth; not applicable: the data or the model do not allow it, or the claim speaks of other models. A claim
that is false is called supported in about one study of forty at most. Claims of no relation or no cost have a
region around 0, which makes the rule the equivalence test (two one-sided tests). Of several parts all must
hold; the numbers are then those of the part that decides. What the published text leaves open was run in
every way named; those rows have verdicts of their own. Verdicts of many claims are not corrected for their
number: each stands for itself."""


@dataclass(frozen=True)
class Cell:
    """The verdict on one claim for one model.

    Attributes:
        verdict: one of the four words; "" where the model was not judged.
        effect: value, interval, unit and n.
        published: the published figure.
        detail: what is needed, or why there is no verdict.
        parts: where there are several, each with its numbers, region and verdict.
    """

    verdict: str = ""
    effect: str = ""
    published: str = ""
    detail: str = ""
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.verdict, self.effect, self.detail, self.published)))


@dataclass(frozen=True)
class Line:
    """One claim, or one alternative of it, with a cell for each model.

    Attributes:
        id: of the claim.
        lead: the statement, or parameter and setting.
        rule: where it is true, and why the line is drawn there.
        note: what must be known to read it.
        cells: in the order of the models.
    """

    id: str
    lead: str
    rule: str
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class ClaimSection(Section):
    """The section on claims: a section of the report with its tables at hand as lines too.

    Attributes:
        lines: the claims as they stand.
        alternatives: what the published text leaves open: the chosen setting and every other, side by side.
    """

    lines: tuple[Line, ...] = ()
    alternatives: tuple[Line, ...] = ()


def section(table: pd.DataFrame, models: Sequence[str]) -> ClaimSection:
    """The report's section on published claims.

    Args:
        table: as `judge_claims` makes it.
        models: by name, in order.
    """
    main = where(table, parameter="")
    lines = tuple(_line(rows, str(rows["statement"].iloc[0]), models) for _, rows in main.groupby("id", sort=False))
    others = tuple(_alternatives(table, models))
    heads = ("claim", "what is said", "true where", *models)
    return ClaimSection(
        title="Do the published claims hold here?",
        question="Each claim of arXiv 2605.08200 and 2606.17389, judged by a rule fixed beforehand.",
        answer=_answer(main, models),
        points=tuple(_points(main, models)),
        facts=(
            ("rule", "95 % interval inside the region in which the claim is true: supported; outside: contradicted"),
            ("power", "n needed: questions for a power of 80 %, if the estimate were the truth"),
            ("claims", f"{counted(len(lines), 'claim')}, {counted(_count(table), 'alternative setting')}"),
        ),
        method=_METHOD,
        table=(heads, tuple((line.id, line.lead, line.rule, *map(str, line.cells)) for line in lines)),
        summary=_summary(main, models),
        lines=lines,
        alternatives=others,
    )


def _count(table: pd.DataFrame) -> int:
    return int((table[["id", "parameter", "setting"]].drop_duplicates()["parameter"] != "").sum())


def _line(rows: pd.DataFrame, lead: str, models: Sequence[str]) -> Line:
    by_model = {str(row["model"]): row for _, row in rows.iterrows()}
    regions = dict.fromkeys(f"{row['region']}: {row['rule']}" for _, row in rows.iterrows())
    first = rows.iloc[0]
    cells = tuple(_cell(by_model[model]) if model in by_model else Cell() for model in models)
    return Line(str(first["id"]), lead, _minus(" / ".join(regions)), str(first["note"]), cells)


def _alternatives(table: pd.DataFrame, models: Sequence[str]) -> Iterator[Line]:
    """For each parameter that is left open, the claim as it stands and then every other setting, without the note."""
    shown = set()
    for (name, parameter, setting), rows in table.groupby(["id", "parameter", "setting"], sort=False):
        if not parameter:
            continue
        if (name, parameter) not in shown:
            shown.add((name, parameter))
            chosen = f"{parameter}: {rows['chosen'].iloc[0]} (as above)"
            yield replace(_line(where(table, id=name, parameter=""), chosen, models), note="")
        yield replace(_line(rows, f"{parameter}: {setting}", models), note="")


def _cell(row: pd.Series) -> Cell:
    published = f"published: {_minus(str(row['published']))}" if row["published"] else ""
    parts = tuple(_minus(part) for part in str(row["parts"]).split("; ") if part)
    return Cell(str(row["verdict"]), _effect(row), published, _detail(row), parts)


def _effect(row: pd.Series) -> str:
    """Value, interval, unit and n; with its name where the claim has several parts."""
    if pd.isna(row["value"]):
        return ""
    digits = 1 if row["unit"] in ("points", "%") else 3 if abs(row["value"]) < 0.1 else 2
    interval = "" if pd.isna(row["low"]) else f" [{text(row['low'], digits)},{GLUE}{text(row['high'], digits)}]"
    unit = f"{GLUE}{row['unit']}" if row["unit"] else ""
    size = "" if pd.isna(row["n"]) else f", n{GLUE}={GLUE}{row['n']:,}"
    part = f"{row['part']}: " if row["part"] else ""
    return f"{part}{text(row['value'], digits)}{unit}{interval}{size}"


def _detail(row: pd.Series) -> str:
    needed = "" if pd.isna(row["n_needed"]) else f"would need n{GLUE}={GLUE}{row['n_needed']:,}"
    return "; ".join(filter(None, (needed, str(row["reason"]))))


def _minus(words: str) -> str:
    return words.replace(" -", " −").replace("[-", "[−") if not words.startswith("-") else _minus(f" {words}")[1:]


def _counts(main: pd.DataFrame, model: str) -> dict[str, int]:
    found = where(main, model=model)["verdict"].value_counts()
    return {verdict: int(found.get(verdict, 0)) for verdict in VERDICTS}


def _answer(main: pd.DataFrame, models: Sequence[str]) -> str:
    parts = []
    for model in models:
        count = _counts(main, model)
        judged = sum(count.values()) - count["not applicable"]
        parts.append(
            f"in {model}, of {counted(judged, 'claim')} that can be judged, {count['supported']} "
            f"{_hold(count['supported'])}, {count['contradicted']} {_do(count['contradicted'])} not, and "
            f"{count['underpowered']} cannot be decided with these data"
        )
    words = "; ".join(parts)
    return f"{words[:1].upper()}{words[1:]}."


def _hold(count: int) -> str:
    return "holds" if count == 1 else "hold"


def _do(count: int) -> str:
    return "does" if count == 1 else "do"


def _points(main: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        rows = where(main, model=model)
        named = {verdict: list(where(rows, verdict=verdict)["id"]) for verdict in VERDICTS}
        yield f"{model}: " + "; ".join(f"{verdict}: {listed(ids)}" for verdict, ids in named.items() if ids) + "."


def _summary(main: pd.DataFrame, models: Sequence[str]) -> str:
    """One line: how many claims hold in each model, of those that can be judged there."""
    counts = {model: _counts(main, model) for model in models}
    shown = (
        f"{count['supported']} of {sum(count.values()) - count['not applicable']} in {model}"
        for model, count in counts.items()
    )
    return f"Of the published claims that can be judged here, these hold: {listed(shown)}."
