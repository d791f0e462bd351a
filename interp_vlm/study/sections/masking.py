"""Masked patches in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from interp_vlm.study.masking import ALTERNATIVE_DRAWS, ALTERNATIVES, FILLS, MAIN, MASKS, SOURCES
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import blank, colours, dots, finish, places, reference
from interp_vlm.study.sections.words import (
    each,
    excludes,
    grid,
    interval_fact,
    listed,
    one,
    p_text,
    sinks_fact,
    sizes,
    span,
    text,
)  # fmt: skip
from interp_vlm.study.tables import where

__all__ = ["section"]

_METHOD = """A masked image token is replaced, where the decoder receives it, by the mean image token of other
pictures, which serve for nothing else (mean instead of zero, which no picture contains: arXiv 2410.07149). Attention
is that of the last prompt token, averaged over heads and layers, in the run without a mask. Masking the top 30 %:
arXiv 2605.08200."""
_COSTS = """Change of accuracy when image tokens are masked, with 95 % intervals; small ticks: the single random
draws. The masks cover equally many tokens, but for the last, which covers the picture."""
_BEYOND = """What masking the most attended tokens costs beyond masking as many random ones, by kind of question, with
95 % intervals."""
_CHOICES = f"""The same comparison with other choices for what a publication may leave open: what a masked token
becomes, and whose attention ranks the tokens; 95 % intervals. Other fills: against at most {ALTERNATIVE_DRAWS} random
draws."""
_LABELS = {
    ("mean", "all layers"): "mean of other pictures,\nattention of all layers",
    ("own mean", "all layers"): "mean of the same picture",
    ("zero", "all layers"): "zeros",
    ("mean", "last layer"): "attention of the last layer",
}


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on masking."""
    choices = where(table, quantity="change beyond random", mask="top", kind="all")
    table = where(table, **MAIN)
    whole = table[(table["kind"] == "all") & (table["draw"] == "")]
    beyond = whole[(whole["quantity"] == "change beyond random")]
    draws = table[table["quantity"] == "change of accuracy, one draw"]["draw"].nunique()
    return Section(
        title="Do the answers rest on the patches that are attended to?",
        question="What does blanking the most attended patches cost, against random ones and the least attended?",
        answer=_answer(beyond[beyond["mask"] == "top"]),
        points=(*_points(whole, models), _sensitivity(choices, models)),
        facts=(
            ("n", f"{sizes(beyond)} ({beyond['condition'].iloc[0]}), {draws} random draws for each"),
            ("interval", interval_fact(beyond)),
            ("compared with", "as many random patches on the same questions (mean of the draws), and no mask"),
            ("test", "paired sign flips of pictures, Holm-corrected for each model"),
            ("chosen", f"{_chosen(MAIN)}; the alternatives are shown beside it"),
            ("attention sinks", sinks_fact(whole)),
        ),
        method=_METHOD,
        panels=(_costs(table, models), _by_kind(table, models), _by_choice(choices, models)),
        table=_table(table, choices, models),
        summary=_summary(beyond[beyond["mask"] == "top"]),
    )


def _worse(rows: pd.DataFrame) -> pd.Series:
    return pd.Series([excludes(row, 0) and row["value"] < 0 for _, row in rows.iterrows()], rows.index, dtype=bool)


def _answer(top: pd.DataFrame) -> str:
    worse = top[_worse(top)]
    if not len(worse):
        return "There is no evidence for it: masking the most attended patches costs no more than masking random ones."
    points = each((row for _, row in worse.iterrows()), lambda row: f"{text(-row['value'])} points")
    rest = listed(top.loc[~_worse(top), "model"]) if len(worse) < len(top) else ""
    tail = f" For {rest} there is no evidence." if rest else ""
    return f"Yes: masking the most attended patches costs more than masking as many random ones, by {points}.{tail}"


def _summary(top: pd.DataFrame) -> str:
    worse = -top.loc[_worse(top), "value"]
    if not len(worse):
        return "There is no evidence that the attended patches matter more than others."
    low, high = text(worse.min(), 0), text(worse.max(), 0)
    where = "" if len(worse) == len(top) else f" in {len(worse)} of {len(top)} models"
    return (
        f"The attended patches matter{where}: masking them costs {low if low == high else f'{low} to {high}'} points "
        "more accuracy than masking as many random ones."
    )


def _points(whole: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = whole[whole["model"] == model]
        rows = {mask: one(own, quantity="change of accuracy", mask=mask) for mask in MASKS}
        top = one(own, quantity="change beyond random", mask="top")
        rows.pop("top without sinks")
        shown = [f"{MASKS[mask]} {span(row)}" for mask, row in rows.items() if row is not None]
        if top is not None:
            against = f"{span(top)}, {p_text(top['p_holm'])}"
            yield f"{model}, points: {listed(shown)}. Most attended against random: {against}."


def _verdicts(choices: pd.DataFrame, models: Sequence[str], choice: dict[str, str]) -> dict[str, str]:
    """What each model's interval says about the most attended tokens against random ones."""
    rows = {model: one(choices, model=model, **choice) for model in models}
    return {
        model: "no evidence" if not excludes(row, 0) else "more than random" if row["value"] < 0 else "less than random"
        for model, row in rows.items()
        if row is not None
    }


def _sensitivity(choices: pd.DataFrame, models: Sequence[str]) -> str:
    """Whether the answer depends on what a masked token becomes, or on whose attention ranks the tokens."""
    main = _verdicts(choices, models, MAIN)
    other = []
    for choice in ALTERNATIVES:
        found = _verdicts(choices, models, choice)
        words = [f"{verdict} ({model})" for model, verdict in found.items() if verdict != main[model]]
        if words:
            other.append(f"with {_changed(choice)} the verdict is {listed(words)}")
    changes = choices["value"]
    spread = f"the most attended against random lies between {text(changes.min())} and {text(changes.max())} points"
    if not other:
        return f"Other choices ({listed(map(_changed, ALTERNATIVES))}) give every model the same verdict; {spread}."
    return (
        f"The verdict depends on choices that publications leave open: {'; '.join(other)}; over all choices, {spread}."
    )


def _changed(choice: dict[str, str]) -> str:
    """The one thing in which an alternative differs, in words."""
    return FILLS[choice["fill"]] if choice["fill"] != MAIN["fill"] else SOURCES[choice["source"]]


def _chosen(choice: dict[str, str]) -> str:
    return f"{FILLS[choice['fill']]}, {SOURCES[choice['source']]}"


def _costs(table: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = table[(table["kind"] == "all") & (table["quantity"] == "change of accuracy")]
    names = {mask: words.replace(", ", ",\n") for mask, words in MASKS.items()}
    figure, axes = blank(1.2 + 0.5 * len(names))
    reference(axes, 0, "no mask")
    dots(axes, rows.assign(label=rows["mask"].map(names)), list(names.values()), models, by="label")
    draws = table[table["quantity"] == "change of accuracy, one draw"]
    at = places(len(names), len(models))[:, list(names).index("random")]
    for (model, colour), y in zip(colours(models).items(), at, strict=True):
        values = draws.loc[draws["model"] == model, "value"]
        axes.plot(values, np.full(len(values), y), "|", color=colour, alpha=0.45, markersize=6, markeredgewidth=0.8)
    axes.set_xlabel("change of accuracy (points)")
    return Panel("masking", _COSTS, finish(figure, axes))


def _by_kind(table: pd.DataFrame, models: Sequence[str]) -> Panel:
    rows = table[(table["quantity"] == "change beyond random") & (table["mask"] == "top")]
    labels = list(dict.fromkeys(rows["kind"]))
    figure, axes = blank(1.2 + 0.5 * len(labels))
    reference(axes, 0, "as random")
    dots(axes, rows, labels, models, by="kind")
    axes.set_xlabel("most attended against random (points)")
    return Panel("masking-kinds", _BEYOND, finish(figure, axes))


def _by_choice(choices: pd.DataFrame, models: Sequence[str]) -> Panel:
    keys = zip(choices["fill"], choices["source"], strict=True)
    rows = choices.assign(label=[_LABELS[key] for key in keys])
    figure, axes = blank(1.2 + 0.5 * len(_LABELS))
    reference(axes, 0, "as random")
    dots(axes, rows, list(_LABELS.values()), models, by="label")
    axes.set_xlabel("most attended against random (points)")
    return Panel("masking-choices", _CHOICES, finish(figure, axes))


def _table(
    table: pd.DataFrame, choices: pd.DataFrame, models: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    shown = table[table["draw"] == ""]
    words = {"none": "nothing", **MASKS}
    quantities = {
        "accuracy": "accuracy (%)",
        "change of accuracy": "change (points)",
        "change beyond random": "against random",
    }
    leads = shown[["kind", "mask", "quantity"]].drop_duplicates().itertuples(index=False, name=None)
    keys = {(k, words[m], quantities[q]): (k, m, q) for k, m, q in leads if q in quantities}

    def cell(lead: tuple[str, ...], model: str) -> str:
        kind, mask, quantity = keys[lead[0], lead[1], lead[2]]
        row = one(shown, model=model, kind=kind, mask=mask, quantity=quantity)
        return "" if row is None else span(row)

    heads, lines = grid(list(keys), models, cell, ("questions", "masked", "quantity"))
    others: dict[tuple[str, ...], dict[str, str]] = {
        ("all", f"{MASKS['top']}: {_changed(choice)}", "against random"): choice for choice in ALTERNATIVES
    }

    def other(lead: tuple[str, ...], model: str) -> str:
        row = one(choices, model=model, **others[lead])
        return "" if row is None else span(row)

    return heads, lines + grid(list(others), models, other, heads[:3])[1]
