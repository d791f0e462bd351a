"""Accuracy in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from interp_vlm.study.material import AS_GIVEN
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import blank, dots, finish
from interp_vlm.study.sections.words import (
    counted,
    each,
    grid,
    interval_fact,
    listed,
    one,
    percent,
    sizes,
    span,
    text,
)  # fmt: skip

__all__ = ["section"]

_METHOD = """The answer is the most probable token after the prompt, in any spelling. Where a right answer is longer
than one token, its first token has to be met. Several questions share a picture, so whole pictures are resampled."""


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on accuracy."""
    found = table[table["quantity"] == "accuracy"]
    whole = [rows for _, rows in found[found["kind"] == "all"].groupby("condition", sort=False)]
    leads = found[["condition", "kind", "category"]].drop_duplicates().itertuples(index=False, name=None)
    keys = {(c, f"{k} ({s})" if s else k): (c, k, s) for c, k, s in leads}

    def cell(lead: tuple[str, ...], model: str) -> str:
        condition, kind, category = keys[lead[0], lead[1]]
        row = one(found, model=model, condition=condition, kind=kind, category=category)
        return "" if row is None else f"{span(row)} n={row['n']}"

    return Section(
        title="How often are the models right?",
        question="How many questions about pictures that were not used in training are answered correctly?",
        answer=" ".join(map(_sentence, whole)),
        points=tuple(_other_rules(table, models)),
        facts=(
            ("n", listed(f"{sizes(rows)}{_scenes(rows, ' ({} scenes)')}" for rows in whole)),
            ("interval", interval_fact(found)),
            ("compared with", f"always giving a kind's most common answer: {listed(map(_constant, whole))} right"),
            ("test", "sign flips of pictures against that constant answer, Holm-corrected for each model"),
        ),
        method=_METHOD,
        panels=tuple(_panel(rows, models) for _, rows in found.groupby("condition", sort=False)),
        table=grid(list(keys), models, cell, ("pictures", "questions")),
        summary=_summary(whole[0]),
    )


def _scenes(rows: pd.DataFrame, form: str) -> str:
    condition = rows["condition"].iloc[0]
    return "" if condition == AS_GIVEN else form.format(condition)


def _constant(rows: pd.DataFrame) -> str:
    return f"{percent(rows['baseline'].iloc[0])}{_scenes(rows, ' ({})')}"


def _sentence(rows: pd.DataFrame) -> str:
    shown = each((row for _, row in rows.iterrows()), lambda row: span(row, unit="%"))
    return f"{_scenes(rows, 'On {} scenes ')}{shown} of the answers are right."


def _summary(rows: pd.DataFrame) -> str:
    low, high = text(rows["value"].min(), 0), text(rows["value"].max(), 0)
    share = percent(rows["value"].max()) if low == high else f"{low} to {percent(rows['value'].max())}"
    who = "The models answer" if len(rows) > 1 else f"{rows['model'].iloc[0]} answers"
    return (
        f"{who} {share} of the questions correctly; constant answers would reach {percent(rows['baseline'].iloc[0])}."
    )


def _other_rules(table: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    """Where published scoring rules see other accuracies."""
    start = "accuracy by the rule "
    other = table[table["quantity"].str.startswith(start) & (table["kind"] == "all")]
    for model in models:
        rows = other[other["model"] == model]
        if len(rows):
            rules = [f"{row['quantity'].removeprefix(start)} {percent(row['value'], 1)}" for _, row in rows.iterrows()]
            yield f"{model}: by other published scoring rules, {listed(rules)}."


def _panel(rows: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = rows[rows["category"] == ""]
    labels = ["all", *[kind for kind in dict.fromkeys(rows["kind"]) if kind != "all"]]
    figure, axes = blank(1.2 + 0.5 * len(labels))
    dots(axes, rows, labels, models, by="kind")
    constant = rows.drop_duplicates("kind").set_index("kind")["baseline"].reindex(labels)
    axes.plot(constant, range(len(labels)), "|", color="0.35", markersize=13, label="constant answer", zorder=1)
    axes.set(xlim=(-2, 102), xlabel="right answers (%)")
    which = _scenes(rows, "{} scenes: ").capitalize()
    n = counted(int(one(rows, kind="all")["n"]), "question")  # type: ignore[index]
    caption = (
        f"{which}share of right answers by kind of question ({n} in all), with 95 % intervals; tick: constant answer."
    )
    condition = rows["condition"].iloc[0].replace(" ", "-")
    return Panel(f"accuracy-{condition}", caption[0].upper() + caption[1:], finish(figure, axes))
