"""Masked patches in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from interp_vlm.study.masking import MASKS
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import blank, colours, dots, finish, reference
from interp_vlm.study.sections.words import bracket, excludes, grid, interval_fact, listed, one, p_text, sizes, span, text

__all__ = ["section"]


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on masking."""
    whole = table[(table["kind"] == "all") & (table["draw"] == "")]
    beyond = whole[(whole["quantity"] == "change beyond random")]
    draws = table[table["quantity"] == "change of accuracy, one draw"]["draw"].nunique()
    return Section(
        title="Do the answers rest on the patches that are attended to?",
        question="What does it cost to blank the most attended patches, against as many random ones and the least attended?",
        answer=_answer(beyond, models),
        points=tuple(_points(whole, models)),
        facts=(
            ("n", f"{sizes(beyond)} ({beyond['condition'].iloc[0]}), {draws} random draws"),
            ("interval", interval_fact(beyond)),
            ("compared with", "the same questions with as many random patches masked (mean of the draws), and without a mask"),
            ("test", "paired sign flips of pictures, Holm-corrected for each model"),
            ("sinks", _sinks(whole)),
        ),
        method="A masked image token is replaced, where the decoder receives it, by the mean image token of other pictures, "
        "which serve for nothing else. Attention is that of the last prompt token, averaged over heads and layers, on the run "
        "without a mask. Masking of the top 30 %: arXiv 2605.08200; mean instead of zero, which no picture contains: "
        "arXiv 2410.07149.",
        panels=(_panel(table, models),),
        table=_table(table, models),
        summary=_summary(beyond, models),
    )


def _answer(beyond: pd.DataFrame, models: Sequence[str]) -> str:
    worse, rest = [], []
    for model in models:
        row = one(beyond, model=model, mask="top")
        if row is not None and excludes(row, 0) and row["value"] < 0:
            worse.append(f"{text(-row['value'])} points ({model})")
        else:
            rest.append(model)
    if not worse:
        return "There is no evidence for it: masking the most attended patches costs no more than masking as many random ones."
    tail = f" In {listed(rest)} there is no evidence for it." if rest else ""
    return f"Yes: masking the most attended patches costs more accuracy than masking as many random ones, by {listed(worse)}.{tail}"


def _summary(beyond: pd.DataFrame, models: Sequence[str]) -> str:
    rows = [row for model in models if (row := one(beyond, model=model, mask="top")) is not None]
    strong = [-row["value"] for row in rows if excludes(row, 0) and row["value"] < 0]
    if not strong:
        return "Masking the attended patches costs no more than masking random ones."
    low, high = text(min(strong), 0), text(max(strong), 0)
    many = f"{low} points" if low == high else f"{low} to {high} points"
    where = "" if len(strong) == len(rows) else f" in {len(strong)} of {len(rows)} models"
    return f"The attended patches matter{where}: masking them costs {many} more than masking as many random ones."


def _points(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = whole[whole["model"] == model]
        changes = own[own["quantity"] == "change of accuracy"]
        found = {mask: row for mask in MASKS if (row := one(changes, mask=mask)) is not None}
        top = one(own, quantity="change beyond random", mask="top")
        if top is None:
            continue
        yield (
            f"{model}: most attended {span(found['top'])} points, random {span(found['random'])}, least attended "
            f"{span(found['bottom'])}, whole picture {span(found['all'])}; most attended against random "
            f"{text(top['value'])} {bracket(top)} ({p_text(top['p_holm'])})."
        )


def _sinks(whole: pd.DataFrame) -> str:
    counts = whole[whole["quantity"] == "attention sinks on the picture"]
    if float(counts["value"].max()) == 0.0:
        return "no image token reaches the threshold for an attention sink, so leaving sinks out changes nothing here"
    return listed(f"{text(row['value'])} tokens a picture in {row['model']}" for _, row in counts.iterrows())


def _panel(table: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = table[(table["kind"] == "all") & (table["quantity"] == "change of accuracy")]
    names = {mask: words.replace(", ", ",\n") for mask, words in MASKS.items()}
    rows = rows.assign(label=rows["mask"].map(names))
    figure, axes = blank(1.2 + 0.55 * len(names))
    reference(axes, 0, "no mask")
    dots(axes, rows, list(names.values()), models, by="label")
    draws = table[table["quantity"] == "change of accuracy, one draw"]
    step, place = 0.7 / len(models), list(names).index("random")
    for number, (model, colour) in enumerate(colours(models).items()):
        values = draws.loc[draws["model"] == model, "value"]
        y = np.full(len(values), place + (number - (len(models) - 1) / 2) * step)
        axes.scatter(values, y, marker="|", s=40, color=colour, alpha=0.5, linewidths=0.9)
    axes.set_xlabel("change of accuracy (points)")
    caption = (
        "Points of accuracy lost when image tokens are masked, with 95 % intervals; the small ticks are the single random draws. "
        "Every mask but the last covers the same number of tokens."
    )
    return Panel("masking", caption, finish(figure, axes))


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    shown = table[(table["draw"] == "") & table["quantity"].isin(["accuracy", "change of accuracy", "change beyond random"])]
    words = {"none": "no mask", **MASKS}
    leads = shown[["kind", "mask", "quantity"]].drop_duplicates()
    leads = leads[(leads["kind"] == "all") | (leads["quantity"] != "change beyond random")]
    keys = {(k, words[m], q.replace("change beyond", "against")): (k, m, q) for k, m, q in leads.itertuples(index=False, name=None)}

    def cell(lead: tuple[str, ...], model: str) -> str:
        kind, mask, quantity = keys[lead]
        row = one(shown, model=model, kind=kind, mask=mask, quantity=quantity)
        return "" if row is None else span(row)

    return grid(list(keys), models, cell, ("questions", "masked", "quantity (points)"))
