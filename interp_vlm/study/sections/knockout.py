"""Attention knockout in words and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from interp_vlm.study.knockout import ALL_LAYERS, EDGES
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.style import MARKERS, blank, colours, finish, layers_axis, line, reference
from interp_vlm.study.sections.words import excludes, grid, interval_fact, listed, one, p_text, sizes, span, text

__all__ = ["section"]

_CHANGE, _FLIPS = "change of the answer's probability", "answers that flip"


def section(table: pd.DataFrame, models: Sequence[str]) -> Section:
    """The report's section on knockout."""
    change = table[(table["kind"] == "all") & (table["quantity"] == _CHANGE)]
    overall = change[change["window"] == ALL_LAYERS]
    return Section(
        title="By which route does the picture reach the answer?",
        question="Which attention edges, at which depth, does the answer need?",
        answer=_answer(overall, models),
        points=tuple(_points(change, models)),
        facts=(
            ("n", f"{sizes(change)} ({change['condition'].iloc[0]})"),
            ("interval", interval_fact(change)),
            ("compared with", "the same questions without knockout"),
            ("test", "paired sign flips of pictures on the probabilities, Holm-corrected for each model"),
            ("proof", "after every knockout the attention left on the blocked edges was measured: see mass_left in examples/"),
        ),
        method="Attention from the queries to the keys of a route is forbidden before the softmax, in a window of layers or in "
        "all. The score is the probability of the answer that the model gives without knockout, p: its change is "
        "100 (p_knockout − p) / p (Geva et al. 2023, section 5). Windows over depth and routes as in arXiv 2411.18620.",
        panels=tuple(_panel(change[change["model"] == model], model) for model in models),
        table=_table(table, models),
        summary=_summary(overall, models),
    )


def _answer(overall: pd.DataFrame, models: Sequence[str]) -> str:
    text_route = [row for model in models if (row := one(overall, model=model, route="image to all text")) is not None]
    hit = [row for row in text_route if excludes(row, 0) and row["value"] < 0]
    if not hit:
        return "There is no evidence that the answer needs any of these routes."
    first = listed(f"{text(-row['value'], 0)} % ({row['model']})" for row in hit)
    strongest = []
    for model in models:
        own = overall[(overall["model"] == model) & (overall["route"] != "image to all text")]
        if len(own) and own["value"].min() < 0:
            strongest.append(f"{own.loc[own['value'].idxmin(), 'route']} ({model})")
    return (
        f"Without any look of the text at the picture the answer loses {first} of its probability; of the single routes it needs "
        f"most {listed(strongest)}."
    )


def _summary(overall: pd.DataFrame, models: Sequence[str]) -> str:
    rows = overall[(overall["route"] == "image to last")]
    parts = [f"{text(-row['value'], 0)} % in {row['model']}" for _, row in rows.iterrows() if excludes(row, 0) and row["value"] < 0]
    if not parts:
        return ""
    return f"Forbidding the last token alone to look at the picture takes {listed(parts)} of the answer's probability."


def _points(change: pd.DataFrame, models: Sequence[str]) -> Iterator[str]:
    for model in models:
        own = change[change["model"] == model]
        overall = own[own["window"] == ALL_LAYERS]
        shown = [f"{row['route']} {span(row, 0, ' %')}" for _, row in overall.iterrows()]
        single = own[(own["window"] != ALL_LAYERS) & (own["route"] != "image to all text")]
        deepest = single.loc[single["value"].idxmin()]
        layers = f"layer {deepest['window']}" if "-" not in deepest["window"] else f"layers {deepest['window']}"
        yield (
            f"{model}, all layers: {listed(shown)}. The single window that costs most is {layers} of {deepest['route']}: "
            f"{span(deepest, 0, ' %')} ({p_text(deepest['p_holm'])})."
        )


def _panel(rows: pd.DataFrame, model: str) -> Panel:
    figure, axes = blank(3.6)
    windows = rows[rows["layer"] >= 0]
    n_layers = int(windows["layer"].max()) + 1
    reference(axes, 0, "", vertical=False)
    for number, (route, colour) in enumerate(colours(list(EDGES)).items()):
        marker = MARKERS[number]
        line(axes, windows[windows["route"] == route], colour, route, marker)
        whole = one(rows, route=route, window=ALL_LAYERS)
        if whole is not None:
            x = n_layers - 0.3 + 0.16 * number
            error = [[abs(whole["value"] - whole["low"])], [abs(whole["high"] - whole["value"])]]
            axes.errorbar(x, whole["value"], yerr=pd.DataFrame(error).fillna(0), fmt=marker, color=colour, markersize=5, linewidth=1.6)
    wide = max(len(str(window).split("-")) for window in windows["window"]) > 1
    layers_axis(axes, n_layers, "centre of the window (decoder layer)" if wide else "decoder layer")
    axes.set_xlim(-0.3, n_layers + 0.4)
    ticks = [tick for tick in axes.get_xticks() if tick == int(tick) and 0 <= tick < n_layers]
    axes.set_xticks([*ticks, n_layers - 0.06], [*(str(int(tick)) for tick in ticks), "all"])
    axes.axvline(n_layers - 0.5, color="0.75", linewidth=0.8)
    axes.set_ylabel("change of the answer's\nprobability (%)")
    caption = f"{model}: what blocking a route costs in each window of layers and (right of the line) in all layers; 95 % intervals."
    return Panel(f"knockout-{model}", caption, finish(figure, axes, columns=2))


def _table(table: pd.DataFrame, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    shown = table[table["window"] == ALL_LAYERS]
    leads = list(shown[["route", "kind"]].drop_duplicates().itertuples(index=False, name=None))

    def cell(lead: tuple[str, ...], model: str) -> str:
        change = one(shown, model=model, route=lead[0], kind=lead[1], quantity=_CHANGE)
        flips = one(shown, model=model, route=lead[0], kind=lead[1], quantity=_FLIPS)
        return "" if change is None or flips is None else f"{span(change, 0)}; flips {text(flips['value'], 0)} %"

    return grid(leads, models, cell, ("blocked in all layers", "questions"))
