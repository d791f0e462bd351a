"""Bypassed layers in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from interp_vlm.study.bypass import PARTS
from interp_vlm.study.changes import CHANGE, EQUIVALENCE, SMALLEST
from interp_vlm.study.sections.multiples import multiples
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, finish, layers_axis, line, reference
from interp_vlm.study.sections.style import PARTS as COLOURS
from interp_vlm.study.sections.words import each, grid, interval_fact, listed, one, p_text, sizes, span, text
from interp_vlm.study.tables import where

__all__ = ["section"]

_NAMES = {"mlp": "MLP", "attention": "attention"}
_LEVEL = 0.05
_METHOD = """What one layer's MLP (or its attention) adds to the residual stream is set to zero at every position, so
that the stream passes it by. The published bypass is that of layer 25 of Qwen2-VL's 28, counted from 0 (arXiv
2605.08200); here the layer at the same relative depth is meant by matched. Zero is a value that the later layers never
met in training: a cost shows that they need the layer's contribution in its place, not what it computes."""
_CAPTION = """Change of accuracy when one layer's MLP or attention is bypassed, with 95 % intervals; dotted: 5 points
either way."""


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on bypassed layers."""
    models = [model for model in models if model in set(table["model"])]
    changes = where(table, quantity=CHANGE, at="each")
    return Section(
        title="What does bypassing one layer's MLP or attention cost?",
        question="Which layers' contributions are needed, and is a late one dispensable?",
        answer=_answer(table, models),
        points=tuple(_points(table, models)),
        facts=(
            ("n", f"{sizes(changes)} ({changes['condition'].iloc[0]})"),
            ("interval", interval_fact(changes)),
            ("compared with", "no bypass, on the same questions"),
            ("smallest detectable effect", listed(_smallest(table, model) for model in models)),
            ("test", "sign flips of pictures and two one-sided t tests, each Holm-corrected over a model's bypasses"),
        ),
        method=_METHOD,
        panels=(_panel(changes, models),),
        table=_table(table, models),
        summary=_summary(changes),
    )


def _worst(changes: pd.DataFrame) -> pd.DataFrame:
    """The bypass that costs each model most, where its cost is beyond chance."""
    found = changes.sort_values("value", kind="stable").drop_duplicates("model").sort_index()
    return found[(found["p_holm"] < _LEVEL) & (found["value"] < 0)]


def _answer(table: pd.DataFrame, models: Sequence[str]) -> str:
    worst = _worst(where(table, quantity=CHANGE, at="each"))
    first = _most(worst) if len(worst) else "No single bypass costs accuracy beyond chance."
    late = []
    for part, name in _NAMES.items():
        rows = where(table, quantity=EQUIVALENCE, part=part, at="matched")
        same = rows.loc[rows["p_holm"] < _LEVEL, "model"]
        if len(same):
            late.append(f"the {name} in {listed(same)}")
    tail = f"Near the end (25/27 of the depth) less than 5 points depend on {listed(late)}." if late else ""
    return f"{first} {tail}".strip()


def _most(worst: pd.DataFrame) -> str:
    said = []
    for (part, layer), rows in worst.groupby(["part", "layer"], sort=False):
        points = each((row for _, row in rows.iterrows()), lambda row: text(-row["value"]))
        said.append(f"the {_NAMES[str(part)]} of layer {layer}, in points: {points}")
    return f"Most is lost without {'; '.join(said)}."


def _summary(changes: pd.DataFrame) -> str:
    worst = _worst(changes)
    if not len(worst):
        return ""
    low, high = text(-worst["value"].max(), 0), text(-worst["value"].min(), 0)
    return (
        f"Bypassing the one contribution that matters most costs {low if low == high else f'{low} to {high}'} points."
    )


def _points(table: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = where(table, model=model, at="matched")
        parts = []
        for part, name in _NAMES.items():
            change, same = (one(own, part=part, quantity=quantity) for quantity in (CHANGE, EQUIVALENCE))
            if change is not None and same is not None:
                parts.append(f"{name} {span(change)}, within 5 points {p_text(same['p_holm'])}")
        if parts:
            which = f"layer {own['layer'].iloc[0]}'s contribution"
            yield f"{model}, points of accuracy without {which}: {'; '.join(parts)}."


def _smallest(table: pd.DataFrame, model: str) -> str:
    rows = where(table, model=model, quantity=SMALLEST, at="each")["value"].dropna()
    return f"{text(rows.min())} to {text(rows.max())} points ({model})" if len(rows) else f"none ({model})"


def _panel(changes: pd.DataFrame, models: Sequence[str]) -> Panel:
    figure, axes_of = multiples(models)
    for model, axes in axes_of.items():
        own = changes[changes["model"] == model]
        reference(axes, 0, vertical=False)
        for edge in (-5, 5):
            axes.axhline(edge, color="0.6", linestyle=":", linewidth=1, zorder=1)
        for number, (part, name) in enumerate(_NAMES.items()):
            line(axes, own[own["part"] == part], COLOURS[number], f"without {name}", MARKERS[number])
        layers_axis(axes, int(changes["layer"].max()) + 1, "")
    figure.supxlabel("decoder layer", fontsize=10)
    figure.supylabel("change of accuracy (points)", fontsize=10)
    return Panel("bypass", _CAPTION, finish(figure, next(iter(axes_of.values()))))


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    quantities = {"accuracy": "accuracy (%)", CHANGE: "change (points)", "answers that flip": "answers that flip (%)"}
    shown = where(table, at="each")
    layers = sorted(set(shown["layer"]))
    keys = {
        (_NAMES[part], f"layer {layer}", words): (part, layer, quantity)
        for part in PARTS
        for layer in layers
        for quantity, words in quantities.items()
    }

    def cell(lead: tuple[str, ...], model: str) -> str:
        part, layer, quantity = keys[lead[0], lead[1], lead[2]]
        row = one(shown, model=model, part=part, layer=layer, quantity=quantity)
        return "" if row is None else span(row)

    return grid(list(keys), models, cell, ("bypassed", "where", "quantity"))
