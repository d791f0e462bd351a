"""Attention knockout in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from interp_vlm.study.knockout import ALL_LAYERS, EDGES
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, PARTS, blank, finish, layers_axis, line, reference
from interp_vlm.study.sections.words import (
    each,
    excludes,
    grid,
    interval_fact,
    listed,
    one,
    p_text,
    percent,
    sizes,
    span,
    text,
)  # fmt: skip

__all__ = ["section"]

_CHANGE, _FLIPS = "change of the answer's probability", "answers that flip"
_LEAK = "largest attention left on a blocked edge"
_METHOD = """Attention from the queries to the keys of a route is forbidden before the softmax, in a window of layers
or in all of them; "image to last" forbids the last prompt token to attend to image tokens. The score is the
probability p of the answer that the model gives without knockout, its change 100 (p_knockout − p) / p (Geva et al.
2023, section 5). Routes, and windows of 9/32 of the depth: arXiv 2411.18620. Blocking "image to last" leaves the way
through the question's words open, and the other way round."""


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on knockout."""
    change = table[(table["kind"] == "all") & (table["quantity"] == _CHANGE)]
    overall = change[change["window"] == ALL_LAYERS]
    leak = float(table.loc[table["quantity"] == _LEAK, "value"].max())
    return Section(
        title="By which route does the picture reach the answer?",
        question="Which attention edges, at which depth, does the answer need?",
        answer=_answer(overall),
        points=tuple(_points(change, models)),
        facts=(
            ("n", f"{sizes(change)} ({change['condition'].iloc[0]})"),
            ("interval", interval_fact(change)),
            ("compared with", "the same questions without knockout"),
            ("test", "paired sign flips of pictures on the probabilities, Holm-corrected for each model"),
            ("proof", f"attention left on the blocked edges, at most over all runs: {leak:g}"),
        ),
        method=_METHOD,
        panels=tuple(_panel(change[change["model"] == model], model) for model in models),
        table=_table(table, models),
        summary=_summary(overall),
    )


def _cost(row: pd.Series) -> str:
    return percent(-row["value"]) if excludes(row, 0) and row["value"] < 0 else "nothing that is evident"


def _route(overall: pd.DataFrame, route: str) -> list[pd.Series]:
    return [row for _, row in overall[overall["route"] == route].iterrows()]


def _answer(overall: pd.DataFrame) -> str:
    everything = _route(overall, "image to all text")
    if not any(excludes(row, 0) and row["value"] < 0 for row in everything):
        return "There is no evidence that the answer needs any of these routes."
    return (
        f"Where no text may look at the picture, answers lose {each(everything, _cost)} of their probability. Where "
        f"only the last token may not, they lose {each(_route(overall, 'image to last'), _cost)}; where only the "
        f"question's words may not, {each(_route(overall, 'image to question'), _cost)}."
    )


def _summary(overall: pd.DataFrame) -> str:
    rows = [row for row in _route(overall, "image to last") if excludes(row, 0) and row["value"] < 0]
    if not rows:
        return "There is no evidence that the last token needs to look at the picture itself."
    return (
        f"Answers lose {each(rows, _cost)} of their probability when the last token itself may not look at the picture."
    )


def _points(change: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = change[change["model"] == model]
        overall = own[own["window"] == ALL_LAYERS]
        shown = [f"{row['route']} {span(row, 0, '%')}" for _, row in overall.iterrows()]
        single = own[(own["window"] != ALL_LAYERS) & own["route"].isin(["image to last", "image to question"])]
        worst = single.sort_values("value").iloc[0]
        layers = f"layers {worst['window']}" if "-" in worst["window"] else f"layer {worst['window']}"
        yield (
            f"{model}, all layers: {listed(shown)}. The narrowest point on the picture's way is {worst['route']} in "
            f"{layers}: {span(worst, 0, '%')}, {p_text(worst['p_holm'])}."
        )


def _panel(rows: pd.DataFrame, model: str) -> Panel:
    figure, axes = blank(3.6)
    windows = rows[rows["layer"] >= 0]
    n_layers = int(windows["layer"].max()) + 1
    right = n_layers - 0.5  # where the results for all layers begin
    spread = 0.16 * max(1.0, n_layers / 4)
    reference(axes, 0, vertical=False)
    for number, route in enumerate(EDGES):
        line(axes, windows[windows["route"] == route], PARTS[number], route, MARKERS[number])
        whole = one(rows, route=route, window=ALL_LAYERS)
        if whole is not None:
            error = np.nan_to_num([[whole["value"] - whole["low"]], [whole["high"] - whole["value"]]])
            style = {"fmt": MARKERS[number], "color": PARTS[number], "markersize": 5, "linewidth": 1.6}
            axes.errorbar(right + (1 + number) * spread, whole["value"], yerr=error, **style)
    wide = windows["window"].str.contains("-").any()
    layers_axis(axes, n_layers, "decoder layer at the centre of the window" if wide else "decoder layer")
    _all_layers(axes, right, right + 5 * spread, n_layers)
    axes.set_ylabel("change of the answer's\nprobability (%)")
    caption = (
        f"{model}: what blocking a route costs in each window of layers and, on the right, in all; 95 % intervals."
    )
    return Panel(f"knockout-{model}", caption, finish(figure, axes, columns=2))


def _all_layers(axes: Axes, left: float, right: float, n_layers: int) -> None:
    """A strip at the right for what is done in all layers at once."""
    axes.set_xlim(-0.3, right)
    ticks = [int(tick) for tick in axes.get_xticks() if tick == int(tick) and 0 <= tick < n_layers]
    axes.set_xticks([*ticks, (left + right) / 2], [*map(str, ticks), "all"])
    axes.axvspan(left, right, color="0.96", zorder=0)


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    shown = table[table["window"] == ALL_LAYERS]
    leads = list(shown[["route", "kind"]].drop_duplicates().itertuples(index=False, name=None))

    def cell(lead: tuple[str, ...], model: str) -> str:
        change = one(shown, model=model, route=lead[0], kind=lead[1], quantity=_CHANGE)
        flips = one(shown, model=model, route=lead[0], kind=lead[1], quantity=_FLIPS)
        return "" if change is None or flips is None else f"{span(change, 0)}; {text(flips['value'], 0)} % flip"

    return grid(leads, models, cell, ("blocked in all layers", "questions"))
